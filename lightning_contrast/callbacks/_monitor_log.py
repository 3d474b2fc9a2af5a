"""Logs what a monitor measured now and then."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor


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
    """Show the singular spectra of two measurements to the loggers that take figures; needs matplotlib.

    Args:
        trainer: Its loggers: TensorBoard's ``add_figure``, or ``log_image`` as Weights & Biases has it.
        name: First part of the figure's name.
        first: Singular values of the first measurement by space, largest first.
        last: Those of the last.
    """
    takers = [logger for logger in trainer.loggers if _takes_figures(logger)]
    if not takers or not last or not trainer.is_global_zero or find_spec("matplotlib") is None:
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
    for logger in takers:
        if hasattr(logger.experiment, "add_figure"):
            logger.experiment.add_figure(f"{name}/spectrum", figure, trainer.global_step)
        else:
            logger.log_image(f"{name}/spectrum", [figure], step=trainer.global_step)


def _takes_figures(logger: Any) -> bool:
    return hasattr(logger, "log_image") or hasattr(getattr(logger, "experiment", None), "add_figure")
