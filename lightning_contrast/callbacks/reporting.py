"""Shows pictures: to the loggers of a Trainer that take them, and as PNG files."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from fsspec.core import url_to_fs
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

Giver: TypeAlias = Callable[[str, "Image", int], Any]
"""Gives a logger a picture, by its tag, at a step."""

FOLDER = "pictures"
"""Folder of the PNG files, below that of the logger or the Trainer."""


def publish(trainer: Any, tag: str, picture: "Image", folder: str | Path | None) -> None:
    """Show a picture at the present step; to be called on rank 0 only.

    Loggers that take pictures are TensorBoard's (``experiment.add_image``), those with a ``log_image(key, images,
    step)`` of their own (Weights & Biases), MLflow's and Comet's (``experiment.log_image``). Others are passed over.

    Args:
        trainer: Of `lightning` or `pytorch_lightning`.
        tag: Name of the picture; words divided by "/".
        picture: In colours, RGB.
        folder: Where a PNG file is written as well. None: only where no logger takes pictures, into ``pictures`` below
            the logger's folder, or ``default_root_dir`` without one.
    """
    step = int(trainer.global_step)
    givers = givers_of(trainer)
    for give in givers:
        give(tag, picture, step)
    if folder is None and givers:
        return
    if folder is None:
        folder = f"{getattr(trainer.logger, 'log_dir', None) or trainer.default_root_dir}/{FOLDER}"
    write_file(str(folder), f"{tag.replace('/', '_')}_step{step:07d}.png", png_bytes(picture))


def givers_of(trainer: Any) -> list[Giver]:
    """Return, for each logger of a Trainer that takes pictures, what gives it one at a step."""
    return [giver for giver in map(_giver, trainer.loggers) if giver is not None]


def _giver(logger: Any) -> Giver | None:
    if hasattr(logger, "log_image"):
        return lambda tag, picture, step: logger.log_image(key=tag, images=[picture], step=step)
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):
        return lambda tag, picture, step: experiment.add_image(tag, np.asarray(picture), step, dataformats="HWC")
    if not hasattr(experiment, "log_image"):
        return None
    if hasattr(logger, "run_id"):  # MLflow's client, which is told the run at each call
        return lambda tag, picture, step: experiment.log_image(logger.run_id, picture, key=tag, step=step)
    return lambda tag, picture, step: experiment.log_image(picture, name=tag, step=step)


def picture_of(figure: "Figure") -> "Image":
    """Return a figure of matplotlib as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def png_bytes(picture: "Image") -> bytes:
    """Return a picture as a PNG file."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def write_file(folder: str, name: str, content: bytes) -> None:
    """Write a file into a folder that need not exist, on this machine or on any file system of fsspec."""
    files, root = url_to_fs(folder)
    files.makedirs(root, exist_ok=True)
    with files.open(f"{root}/{name}", "wb") as file:
        file.write(content)


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
