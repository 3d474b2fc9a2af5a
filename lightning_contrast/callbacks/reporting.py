"""Logging of images and scalars from callbacks, and PNG files."""

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

ImageWriter: TypeAlias = Callable[[str, "Image", int], Any]
"""Writes an image to a logger, with a tag and a step."""

FOLDER = "pictures"
"""Subfolder of the PNG files in the folder of the logger or the Trainer."""


def publish(trainer: Any, tag: str, picture: "Image", folder: str | Path | None) -> None:
    """Log an image at the current step; to be called on rank 0 only.

    Loggers that support images are TensorBoard (``experiment.add_image``), those with their own ``log_image(key,
    images, step)`` (Weights & Biases), MLflow and Comet (``experiment.log_image``). Others are ignored.

    Args:
        trainer: Trainer of `lightning` or `pytorch_lightning`.
        tag: Tag of the image; words separated by "/".
        picture: RGB image.
        folder: Folder of an additional PNG file. None: only if no logger supports images, in ``pictures`` in the
            logger's folder, or in ``default_root_dir`` without one.
    """
    step = int(trainer.global_step)
    writers = image_writers(trainer)
    for write in writers:
        write(tag, picture, step)
    if folder is None and writers:
        return
    if folder is None:
        folder = f"{getattr(trainer.logger, 'log_dir', None) or trainer.default_root_dir}/{FOLDER}"
    write_file(str(folder), f"{tag.replace('/', '_')}_step{step:07d}.png", png_bytes(picture))


def image_writers(trainer: Any) -> list[ImageWriter]:
    """Return a writer for each logger of a Trainer that supports images."""
    return [writer for writer in map(_image_writer, trainer.loggers) if writer is not None]


def _image_writer(logger: Any) -> ImageWriter | None:
    if hasattr(logger, "log_image"):
        return lambda tag, picture, step: logger.log_image(key=tag, images=[picture], step=step)
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):
        return lambda tag, picture, step: experiment.add_image(tag, np.asarray(picture), step, dataformats="HWC")
    if not hasattr(experiment, "log_image"):
        return None
    if hasattr(logger, "run_id"):  # MLflow's client, which takes the run at each call
        return lambda tag, picture, step: experiment.log_image(logger.run_id, picture, key=tag, step=step)
    return lambda tag, picture, step: experiment.log_image(picture, name=tag, step=step)


def picture_of(figure: "Figure") -> "Image":
    """Render a matplotlib figure as an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def png_bytes(picture: "Image") -> bytes:
    """Encode an image as PNG."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def write_file(folder: str, name: str, content: bytes) -> None:
    """Write a file to a local or fsspec folder, which is created if necessary."""
    files, root = url_to_fs(folder)
    files.makedirs(root, exist_ok=True)
    with files.open(f"{root}/{name}", "wb") as file:
        file.write(content)


def log_values(trainer: Any, pl_module: Any, values: Mapping[str, float | Tensor], *, on_epoch: bool = False) -> None:
    """Log values to ``callback_metrics`` and, at the current step, to the loggers; they are equal on all ranks.

    A Trainer passes values to its loggers in every n-th step only, which may not be the step of a measurement.

    Args:
        trainer: Trainer of `lightning` or `pytorch_lightning`.
        pl_module: Its module, in a hook that allows logging.
        values: Scalars by name.
        on_epoch: Whether the hook belongs to an epoch and not to a step.
    """
    for name, value in values.items():
        pl_module.log(name, value, on_step=not on_epoch, on_epoch=on_epoch, logger=False, sync_dist=on_epoch)
    if trainer.loggers and trainer.is_global_zero:
        scalars = {name: float(value) for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)


def draw_spectra(trainer: Any, name: str, first: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> None:
    """Plot the singular spectra of two measurements to the loggers that support images; needs matplotlib.

    Args:
        trainer: The Trainer, see `publish` for its loggers.
        name: Prefix of the tag.
        first: Singular values of the first measurement by space, ``(D,)``, largest first.
        last: Singular values of the last measurement.
    """
    if not last or not trainer.is_global_zero or find_spec("matplotlib") is None:
        return
    writers = image_writers(trainer)
    if not writers:
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
    for write in writers:
        write(f"{name}/spectrum", picture, int(trainer.global_step))
