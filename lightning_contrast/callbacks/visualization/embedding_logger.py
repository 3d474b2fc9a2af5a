"""Features of validation images in TensorBoard's projector, on a map, and as nearest neighbors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_word
from lightning_contrast.callbacks.capture.dataloaders import check_source, training_loader
from lightning_contrast.callbacks.capture.feature_bank import EncodedRows, encoded
from lightning_contrast.callbacks.capture.features import FeatureHook, count_images, warn_of_nan
from lightning_contrast.callbacks.capture.forward_pass import complete
from lightning_contrast.callbacks.capture.labels import (
    Labels,
    Source,
    UnreadableBatchError,
    check_place,
    find_pictures,
    read_classes,
    warn_unreadable,
)
from lightning_contrast.callbacks.reporting import publish
from lightning_contrast.callbacks.visualization.images import Display, fit_squares, statistics_of
from lightning_contrast.callbacks.visualization.neighbours import NeighborHistory
from lightning_contrast.callbacks.visualization.projector import add_snapshot, summary_writers
from lightning_contrast.callbacks.visualization.sample import Part, Sample, SampleShare, gather_sample
from lightning_contrast.callbacks.visualization.scatter import Layout, check_layout, class_word, draw_map

EDGE = 64
"""Width and height of a thumbnail in pixels."""
SNAPSHOTS = 5
"""Number of projector snapshots that are kept: the first and the newest."""


class EmbeddingLogger(L.Callback):
    """Log the features of a bounded sample of images at validation: projector, map, and nearest neighbors.

    The sample is spread evenly over the first validation loader, whose features are taken from the validation step.
    With ``dataloader``, images of that loader are encoded in eval mode at each validation, or at the end of each epoch
    in runs without validation. Three outputs show the same sample:

    - TensorBoard's projector, for each `TensorBoardLogger`: features with thumbnails and labels. The first snapshot and
      the newest four are kept.
    - ``<name>/map``, a picture: the images, and points in the colors of their classes, at the first two principal
      components, at t-SNE coordinates or at those of a function. Requires matplotlib (extra ``demo``).
    - ``<name>/neighbours``, a picture: fixed query images with their nearest neighbors by cosine similarity at the
      first measurement and at the newest four. Green frames mark neighbors of the query's class, red frames all others.

    Pictures are logged as by `ViewLogger`. Images are identified by their pixels, so queries are found again when the
    order of the loader changes.

    Training stays bit-identical. A checkpoint stores the ids of queries and neighbors, at most
    8 x ``queries`` x (5 x ``neighbours`` + 1) bytes, so that a resumed run continues with the same queries. Memory
    during validation: features and 12 KiB for each of ``samples`` images. Rank 0 draws while the other ranks wait; see
    ``docs/pictures.md`` for the time. Images with non-finite features are excluded with a warning.

    Args:
        features: Name of one layer, as for `OnlineLinearProbe`.
        dataloader: A loader, or a DataModule whose training loader is used; None: the first validation loader.
        labels: As for `OnlineLinearProbe`; None: the labels of the batch, if they are class indices.
        class_names: Name of each class; None: ``class_names`` of the DataModule if it has them, else numbers.
        samples: Maximum number of images over all ranks, >= 3.
        every_n_validations: Log at every n-th validation, starting with the first.
        projector: Whether to write snapshots for TensorBoard's projector.
        layout: "pca", "tsne" (scikit-learn), a function from L2-normalized features ``(N, F)`` to coordinates
            ``(N, 2)``, for example of ``umap.UMAP``, or None for no map.
        queries: Number of query images; 0 for no neighbors.
        neighbours: Number of neighbors of each query, >= 1.
        tokens: As for `OnlineLinearProbe`.
        name: Prefix of the logged names; must be unique among the `EmbeddingLogger` callbacks of a Trainer.
        png_dir: As for `ViewLogger`.
        channels: As for `ViewLogger`.
        mean: As for `ViewLogger`.
        std: As for `ViewLogger`.
        images: As for `ViewLogger`.

    Raises:
        ValueError: If an argument is out of its range.
        ModuleNotFoundError: If matplotlib or scikit-learn is needed for the map and missing.
    """

    def __init__(
        self,
        features: str = "backbone",
        *,
        dataloader: Any = None,
        labels: Labels = None,
        class_names: Sequence[str] | None = None,
        samples: int = 512,
        every_n_validations: int = 1,
        projector: bool = True,
        layout: Layout = "pca",
        queries: int = 8,
        neighbours: int = 8,
        tokens: str = "mean",
        name: str = "embeddings",
        png_dir: str | Path | None = None,
        channels: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        images: Source = None,
    ) -> None:
        check_place("images", images)
        check_at_least("samples", samples, 3)
        check_at_least("every_n_validations", every_n_validations, 1)
        check_at_least("queries", queries, 0)
        check_at_least("neighbours", neighbours, 1)
        check_layout(layout)
        if dataloader is not None:
            check_source("dataloader", dataloader)
        check_word("name", name, "It is the prefix of the logged names")
        self.dataloader, self.labels, self.class_names, self.samples = dataloader, labels, class_names, samples
        self.every_n_validations, self.projector, self.layout = every_n_validations, projector, layout
        self.name, self.png_dir, self.images = name, png_dir, images
        self._hook = FeatureHook(features, tokens)
        self._display = Display(channels, mean, std)
        self._neighbors = NeighborHistory(queries, neighbours)
        self._loader: Any = None
        self._validations = 0
        self._warned_of_nan = self._warned_of_queries = self._unreadable = False
        self._share: SampleShare | None = None
        self._parts: list[Part] = []

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``, unique per name."""
        return f"EmbeddingLogger[{self.name}]"

    # Hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Reset the state (a checkpoint's is loaded later)."""
        if stage == "fit":
            self._validations, self._unreadable = 0, False
            self._warned_of_nan = self._warned_of_queries = False
            self._neighbors.clear()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the feature hook; layers exist in their final, wrapped form only from here on."""
        self._hook.attach(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn if the run has no validation data."""
        if not trainer.enable_validation and self.dataloader is None:
            rank_zero_warn(
                f"EmbeddingLogger `{self.name}` has no images: this run has no validation data. Give `dataloader=`."
            )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the feature hook and start a sample if this validation is logged."""
        self._hook.attach(pl_module)
        self._parts, self._share = [], None
        if self.dataloader is None and not self._unreadable and self._is_due(trainer):
            self._share = SampleShare(self.samples, next(iter(trainer.num_val_batches), 0))

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Arm the feature hook for a batch of the first loader."""
        if self._share is not None and dataloader_idx == 0:
            self._hook.arm(count_images(batch))

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep features and thumbnails of the sampled images of a batch."""
        if self._share is None or dataloader_idx != 0:
            return
        try:
            images = find_pictures(batch, self.images)[0]
        except UnreadableBatchError as error:
            self._warn_unreadable(error)
            return
        with torch.no_grad():
            with trainer.precision_plugin.forward_context():
                complete(trainer, pl_module, [self._hook], outputs, lambda: images)
            features = self._hook.read(pl_module, outputs)
            chosen = self._share.choose(len(features))
            if chosen:
                rows, positions = (torch.tensor(numbers) for numbers in zip(*chosen, strict=True))
                self._parts.append(self._part(trainer, features, images, batch, rows, positions))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the sample, except after the sanity check, which precedes training."""
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module)
        self._parts, self._share = [], None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log a sample of ``dataloader`` in runs without validation."""
        if not trainer.enable_validation and self.dataloader is not None:
            self._measure(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the feature hook."""
        self._hook.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the feature hook; `teardown` is not called after an exception."""
        self._hook.detach()
        self._parts, self._share = [], None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations, and the ids of queries and neighbors."""
        return {"validations": self._validations, "neighbors": self._neighbors.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations and the ids."""
        self._validations = state_dict["validations"]
        self._neighbors.load_state_dict(state_dict["neighbors"])

    # Measurement.

    def _is_due(self, trainer: Any) -> bool:
        fitting = trainer.state.fn == "fit"
        return trainer.sanity_checking or not fitting or self._validations % self.every_n_validations == 0

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        """Gather the sample of all ranks and log it on rank 0."""
        due = self._is_due(trainer)
        self._validations += 1
        if not due:
            return
        if self.dataloader is not None and not self._unreadable:
            self._parts = self._encode(trainer, pl_module)
        sample = gather_sample(self._parts, self.samples)
        if sample is None:
            return
        finite = torch.isfinite(sample.features).all(dim=1)
        self._warned_of_nan = self._warned_of_nan or warn_of_nan(self, self._hook.features, finite)
        sample = sample.select(finite)
        if len(sample.ids) >= 3:
            with torch.no_grad():
                self._log(trainer, sample)

    def _log(self, trainer: Any, sample: Sample) -> None:
        step, epoch = int(trainer.global_step), int(trainer.current_epoch)
        source = trainer.datamodule if self.dataloader is None else self.dataloader
        names = self.class_names or getattr(source, "class_names", None)
        if self.projector:
            words = None if sample.labels is None else [class_word(int(label), names) for label in sample.labels]
            for writer in summary_writers(trainer):
                add_snapshot(writer, self.name, step, sample, words, keep=SNAPSHOTS)
        if self.layout is not None:
            picture = draw_map(sample, names, self.layout, f"{self._hook.features}, epoch {epoch}, step {step}")
            publish(trainer, f"{self.name}/map", picture, self.png_dir)
        if self._neighbors.queries:
            missing = self._neighbors.measure(sample, f"epoch {epoch}")
            if missing and not self._warned_of_queries:
                self._warned_of_queries = True
                rank_zero_warn(
                    f"{type(self).__name__} `{self.name}`: {missing} of the queries are no longer in the sample. "
                    "Use a fixed validation set."
                )
            publish(trainer, f"{self.name}/neighbours", self._neighbors.draw(sample, names), self.png_dir)

    def _warn_unreadable(self, error: UnreadableBatchError) -> None:
        self._parts, self._share, self._unreadable = [], None, True
        warn_unreadable(self, error)

    def _part(
        self, trainer: Any, features: Tensor, images: Tensor, batch: Any, rows: Tensor, positions: Tensor
    ) -> Part:
        """Return features, thumbnails and labels of some rows of a batch."""
        pixels = self._display.pixels(images[rows], statistics_of(trainer, training=False))
        labels = read_classes(batch, self.labels, type(self).__name__)
        return Part(
            positions, features[rows], fit_squares(pixels, EDGE), None if labels is None else labels[rows].cpu()
        )

    def _encode(self, trainer: Any, pl_module: Any) -> list[Part]:
        """Encode this rank's share of ``dataloader``."""
        if self._loader is None:
            self._loader = training_loader("dataloader", self.dataloader, trainer)
        parts: list[Part] = []

        def _add_part(features: Tensor, batch: Any, layer: int) -> EncodedRows:
            start = sum(len(part.positions) for part in parts)
            positions = torch.arange(start, start + len(features))
            images = find_pictures(batch, self.images)[0]
            parts.append(self._part(trainer, features, images, batch, torch.arange(len(features)), positions))
            return EncodedRows(features, positions, torch.ones_like(positions, dtype=torch.bool))

        try:
            encoded_chunks = encoded(
                trainer,
                pl_module,
                [self._hook],
                self._loader,
                _add_part,
                limit=self.samples,
                images=self.images,
                evenly=True,
            )
        except UnreadableBatchError as error:
            self._warn_unreadable(error)
            return []
        own = torch.cat([rows.targets for rows in encoded_chunks[self._hook.features]])
        return [part.select(torch.isin(part.positions, own)) for part in parts]
