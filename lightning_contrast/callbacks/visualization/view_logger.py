"""Pictures of the views of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_word
from lightning_contrast.augment.images import rescale
from lightning_contrast.callbacks.capture.labels import (
    Source,
    UnreadableBatchError,
    check_place,
    find_pictures,
    pixel_range_of,
    warn_unreadable,
)
from lightning_contrast.callbacks.reporting import publish
from lightning_contrast.callbacks.visualization.images import (
    Display,
    Row,
    Statistics,
    Tile,
    centered,
    fit_squares,
    grid,
    statistics_of,
)
from lightning_contrast.contracts import Images
from lightning_contrast.runtime.batch_transfer import BatchTransforms, map_batches

MAX_EDGE = 224
"""Maximum edge of a tile in pixels; larger views are downsampled."""
MIN_EDGE = 64
"""Smaller views are enlarged by an integer factor up to this edge."""


class ViewLogger(L.Callback):
    """Log a grid of the first images of a training batch and their views.

    Each row has the original image, as received by `ViewAugmentation`, and its views as passed to ``training_step``, at
    their relative sizes. Loaders that yield views have no originals; without views, the images are logged. Views
    created inside ``training_step`` are not visible to the callback. Normalization is reverted with the statistics of
    the Trainer's `ViewAugmentation`, or with ``mean`` and ``std``; without either, images whose values exceed 0..1 are
    rescaled to 0..1. If the `ViewAugmentation` has a ``strength``, its value is written beside the first row.

    The picture ``<name>`` is sent to all loggers that accept images (TensorBoard, Weights & Biases, MLflow, Comet);
    without one, PNG files are written. Only rank 0 logs, from its own batch. With a `CombinedLoader`, the first batch
    is logged.

    Training stays bit-identical: no random number is drawn and nothing is recomputed. A checkpoint stores whether the
    picture was logged. Overhead: every ``every_n_epochs`` epochs, a copy of ``samples`` images and their views to the
    CPU and the encoding of one picture; see ``docs/pictures.md``.

    Args:
        samples: Maximum number of images, >= 1.
        every_n_epochs: Log at the first batch of every n-th epoch, starting with epoch 0. None: once per run.
        png_dir: Folder for PNG files, in addition to the loggers. None: PNG files only if no logger accepts images, in
            ``pictures`` below the logger's folder, or below ``default_root_dir`` without a logger.
        channels: Indices of the channels shown as red, green and blue, or of one channel shown in gray; None: the first
            three, or the first if there are fewer.
        mean: Mean of each channel, if the loader yields normalized views.
        std: Standard deviation of each channel; given together with ``mean``.
        images: Where the images are: the key of a dict batch, the index into a tuple or list, or a function of the
            batch; None follows the batch contract. If a batch has none, the callback warns once and logs nothing.
        name: Name of the picture; must be unique among the `ViewLogger` callbacks of a Trainer.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        samples: int = 8,
        *,
        every_n_epochs: int | None = 1,
        png_dir: str | Path | None = None,
        channels: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        images: Source = None,
        name: str = "views",
    ) -> None:
        check_at_least("samples", samples, 1)
        check_place("images", images)
        if every_n_epochs is not None:
            check_at_least("every_n_epochs", every_n_epochs, 1)
        check_word("name", name, "It is the name of the picture")
        self.samples, self.images, self.every_n_epochs = samples, images, every_n_epochs
        self.png_dir, self.name = png_dir, name
        self._display = Display(channels, mean, std)
        self._trainer: Any = None
        self._armed = self._shown = self._unreadable = False
        self._originals: Tensor | None = None

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``, unique per name."""
        return f"ViewLogger[{self.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Register a transform before `ViewAugmentation`, and reset the state (a checkpoint's is loaded later)."""
        if stage == "fit":
            self._unreadable = False
            self._trainer, self._armed, self._shown, self._originals = trainer, False, False, None
            BatchTransforms.add(trainer.strategy, self._keep_originals, first=True)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Arm the callback for the first batch of an epoch that is logged."""
        every = self.every_n_epochs
        due = not self._shown if every is None else trainer.current_epoch % every == 0
        self._armed = due and trainer.is_global_zero and not self._unreadable

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Log the batch that is passed to ``training_step``."""
        if not self._armed:
            return
        originals, self._originals, self._armed = self._originals, None, False
        with torch.no_grad():
            found = self._first(batch)
            if found is None:
                return
            columns = self._columns(found, originals, statistics_of(trainer, training=True))
            rows = [Row([Tile(column[i]) for _, column in columns]) for i in range(len(columns[0][1]))]
            rows[0] = rows[0]._replace(words=_strength_of(trainer))
            picture = grid(rows, [title for title, _ in columns], columns[0][1].shape[-1])
        publish(trainer, self.name, picture, self.png_dir)
        self._shown = True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the strategy."""
        self._remove(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the strategy; `teardown` is not called after an exception."""
        self._remove(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return whether the picture was logged: with ``every_n_epochs=None`` a resumed run does not repeat it."""
        return {"shown": self._shown}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore whether the picture was logged."""
        self._shown = state_dict["shown"]

    def _remove(self, trainer: Any) -> None:
        BatchTransforms.remove(trainer.strategy, self._keep_originals)
        self._trainer = self._originals = None

    def _keep_originals(self, batch: Any) -> Any:
        """Copy the first images of a batch that will be logged."""
        if self._armed and self._trainer.training:
            found = self._first(batch)
            self._originals = found[: self.samples].clone() if isinstance(found, Tensor) else None
        return batch

    def _first(self, batch: Any) -> Images | None:
        """Return the images or views of the first loader's batch; warn once if there are none."""
        found: list[list[Tensor]] = []
        read = lambda one: found.append(find_pictures(one, self.images))  # noqa: E731
        try:
            map_batches(batch, read, self._trainer.train_dataloader)
        except UnreadableBatchError as error:
            self._armed, self._unreadable = False, True
            warn_unreadable(self, error)
            return None
        return found[0] if len(found[0]) > 1 else found[0][0]

    def _columns(
        self, found: Images, originals: Tensor | None, of_views: Statistics | None
    ) -> list[tuple[str, Tensor]]:
        """Return a title and pictures, ``(N, 3, edge, edge)``, for each column."""
        if isinstance(found, Tensor):
            shown = [("image", self._display.pixels(found[: self.samples]))]
        else:
            views = [self._display.pixels(view[: self.samples], of_views) for view in found]
            shown = [(f"view {number}", view) for number, view in enumerate(views, 1)]
        longest = max(max(view.shape[-2:]) for _, view in shown)
        edge = min(MAX_EDGE, longest * max(1, MIN_EDGE // longest))
        columns = [(title, fit_squares(centered(view, longest), edge)) for title, view in shown]
        if originals is not None and not isinstance(found, Tensor):
            limits = pixel_range_of(self._trainer)
            first = Display(self._display.channels).pixels(originals if limits is None else rescale(originals, limits))
            columns.insert(0, ("original", fit_squares(first, edge)))
        return columns


def _strength_of(trainer: Any) -> str:
    """Return the words for the strength of the views, empty if none was given."""
    for callback in trainer.callbacks:
        if getattr(callback, "strength", None) is not None and hasattr(callback, "current_strength"):
            return f"strength\n{callback.current_strength:.2f}"
    return ""
