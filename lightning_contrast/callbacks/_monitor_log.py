"""Logs what a monitor measured now and then."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from lightning_contrast.callbacks._publish import givers_of, picture_of


def log_values(trainer: Any, pl_module: Any, values: Mapping[str, float | Tensor], *, on_epoch: bool = False) -> None:
    """Bring values that are equal on all ranks to ``callback_metrics``, and to the loggers at this very step.

    A Trainer shows its loggers every n-th step only, which need not be the steps that a monitor measures.

    Args:
        trainer: Of `lightning` or `pytorch_lightning`.
        pl_module: Its module, in a hook that may log.
        values: Scalars by name.
        on_epoch: Whether the hook belongs to an epoch and not to a step.
    """
    for name, value in values.items():
        pl_module.log(name, value, on_step=not on_epoch, on_epoch=on_epoch, logger=False, sync_dist=on_epoch)
    if trainer.loggers and trainer.is_global_zero:
        plain = {name: float(value) for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(plain, step=trainer.global_step)


def draw_spectra(trainer: Any, name: str, first: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> None:
    """Show the singular spectra of two measurements to the loggers that take pictures; needs matplotlib.

    Args:
        trainer: See `publish` for its loggers.
        name: First part of the picture's name.
        first: Singular values of the first measurement by space, largest first.
        last: Those of the last.
    """
    if not last or not trainer.is_global_zero or find_spec("matplotlib") is None:
        return
    givers = givers_of(trainer)
    if not givers:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(last), 4), layout="constrained")
    for axes, space in zip(figure.subplots(1, len(last), squeeze=False)[0], last, strict=True):
        for label, spectra in (("first measurement", first), (f"step {trainer.global_step}", last)):
            values = spectra.get(space)
            if values is not None and len(values) and float(values[0]) > 0:
                axes.loglog(range(1, len(values) + 1), (values / values[0]).clamp(min=1e-8), label=label)
        axes.set(title=space, xlabel="rank", ylabel="singular value / largest")
        axes.legend()
    picture = picture_of(figure)
    for give in givers:
        give(f"{name}/spectrum", picture, int(trainer.global_step))
