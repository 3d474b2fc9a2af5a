"""Shows what the views of a run look like."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_word, fail
from lightning_contrast.callbacks.reporting import publish
from lightning_contrast.callbacks.visualization.images import (
    Display,
    Row,
    Statistics,
    Tile,
    centred,
    fitted,
    grid,
    statistics_of,
)
from lightning_contrast.contracts import Images, split_batch
from lightning_contrast.runtime.batch_transfer import BatchTransforms, map_batches

MOST = 224
"""Edge of the largest tile in pixels; larger views are shown smaller."""
LEAST = 64
"""Smaller views are enlarged by a whole number up to this edge."""


class ViewLogger(L.Callback):
    """Shows the first images of the first training batch beside their views: is the augmentation what you meant?

    A row for each image: the original as it comes to `ViewAugmentation`, then each view as the step gets it, at their
    relative sizes (local crops are smaller). A loader that yields views has no original to show; in a run without views
    the images are shown. Views that a module makes in its own step cannot be seen. Normalisation is undone with the
    statistics of the Trainer's `ViewAugmentation`, or with ``mean`` and ``std``; without either, an image whose values
    leave 0..1 is stretched to 0..1.

    The picture ``<name>`` goes to every logger that takes pictures (TensorBoard, Weights & Biases, MLflow, Comet) and,
    without one, to PNG files; rank 0 shows its own batch and the others do nothing. Of a `CombinedLoader` the first
    batch is shown.

    The run is left as it was, bit for bit: nothing is drawn at random or computed again. A checkpoint keeps whether the
    picture was shown. Cost: once in ``every_n_epochs`` epochs a copy of ``images`` images and of their views to the
    CPU, and a small picture (`docs/pictures.md` has the time); in all other batches a flag is looked at.

    Args:
        images: Images shown, >= 1; all, where the batch has fewer.
        every_n_epochs: Epochs from one picture to the next, beginning with epoch 0. None: once, at the first batch.
        png_dir: Folder for PNG files beside the loggers. None: PNG files only where no logger takes pictures, in
            ``pictures`` below the logger's folder, or ``default_root_dir`` without one.
        channels: Channels shown as red, green and blue, or one shown in grey; None: the first three, or the first where
            there are fewer.
        mean: Per channel, where views come normalised from the loader.
        std: As ``mean``; both or none.
        name: Name of the picture; must differ between loggers of views.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        images: int = 8,
        *,
        every_n_epochs: int | None = 1,
        png_dir: str | Path | None = None,
        channels: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str = "views",
    ) -> None:
        check_at_least("images", images, 1)
        if every_n_epochs is not None:
            check_at_least("every_n_epochs", every_n_epochs, 1)
        check_word("name", name, "It is the name of the picture")
        self.images, self.every_n_epochs, self.png_dir, self.name = images, every_n_epochs, png_dir, name
        self._display = Display(channels, mean, std)
        self._trainer: Any = None
        self._armed = self._shown = False
        self._originals: Tensor | None = None

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``, so that a Trainer takes several."""
        return f"ViewLogger[{self.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Look at batches before `ViewAugmentation` does; a checkpoint that is resumed is loaded after this."""
        if stage == "fit":
            self._trainer, self._armed, self._shown, self._originals = trainer, False, False, None
            BatchTransforms.add(trainer.strategy, self._look, first=True)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Expect the first batch."""
        every = self.every_n_epochs
        due = not self._shown if every is None else trainer.current_epoch % every == 0
        self._armed = due and trainer.is_global_zero

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Show the batch as the step will get it."""
        if not self._armed:
            return
        originals, self._originals, self._armed = self._originals, None, False
        with torch.no_grad():
            found = self._first(batch)
            columns = self._columns(found, originals, statistics_of(trainer, training=True))
            rows = [Row([Tile(column[i]) for _, column in columns]) for i in range(len(columns[0][1]))]
            picture = grid(rows, [title for title, _ in columns], columns[0][1].shape[-1])
        publish(trainer, self.name, picture, self.png_dir)
        self._shown = True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the strategy as it was."""
        self._remove(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the strategy as it was: `teardown` is not called after an exception."""
        self._remove(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return whether the picture was shown: with ``every_n_epochs=None`` a resumed run does not show another."""
        return {"shown": self._shown}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._shown = state_dict["shown"]

    def _remove(self, trainer: Any) -> None:
        BatchTransforms.remove(trainer.strategy, self._look)
        self._trainer = self._originals = None

    def _look(self, batch: Any) -> Any:
        """Keep the first originals of the batch that is expected."""
        if self._armed and self._trainer.training:
            found = self._first(batch)
            self._originals = found[: self.images].clone() if isinstance(found, Tensor) else None
        return batch

    def _first(self, batch: Any) -> Images:
        """Return the images or views of the first batch that the loaders gave."""
        found: list[Images] = []
        map_batches(batch, lambda one: found.append(split_batch(one)[0]), self._trainer.train_dataloader)
        images = found[0]
        for each in [images] if isinstance(images, Tensor) else images:
            if each.ndim != 4:
                hint = "ViewLogger shows batches of images: remove it, or name the images in a dict"
                fail("batch", "hold images (B, C, H, W)", tuple(each.shape), hint)
        return images

    def _columns(
        self, found: Images, originals: Tensor | None, of_views: Statistics | None
    ) -> list[tuple[str, Tensor]]:
        """Return a title and square pictures (N, 3, edge, edge) for each column."""
        if isinstance(found, Tensor):
            shown = [("image", self._display.pixels(found[: self.images]))]
        else:
            views = [self._display.pixels(view[: self.images], of_views) for view in found]
            shown = [(f"view {number}", view) for number, view in enumerate(views, 1)]
        longest = max(max(view.shape[-2:]) for _, view in shown)
        edge = min(MOST, longest * max(1, LEAST // longest))
        columns = [(title, fitted(centred(view, longest), edge)) for title, view in shown]
        if originals is not None and not isinstance(found, Tensor):
            first = Display(self._display.channels).pixels(originals)
            columns.insert(0, ("original", fitted(first, edge)))
        return columns
