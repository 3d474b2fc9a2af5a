"""Shows which images a representation finds similar: in TensorBoard's projector, on a map, as nearest neighbours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_word, fail
from lightning_contrast.callbacks.capture.dataloaders import check_source, training_loader
from lightning_contrast.callbacks.capture.feature_bank import encoded
from lightning_contrast.callbacks.capture.features import FeatureHook, count_images, warn_of_nan
from lightning_contrast.callbacks.capture.forward_pass import complete
from lightning_contrast.callbacks.capture.labels import Labels, read_labels
from lightning_contrast.callbacks.reporting import publish, tensorboard_folders
from lightning_contrast.callbacks.visualization.images import Display, fitted, statistics_of
from lightning_contrast.callbacks.visualization.neighbours import Strips
from lightning_contrast.callbacks.visualization.projector import write_projector
from lightning_contrast.callbacks.visualization.sample import Gallery, Part, Share, gather_gallery
from lightning_contrast.callbacks.visualization.scatter import Layout, check_layout, class_word, draw_map
from lightning_contrast.contracts import split_batch

EDGE = 64
"""Width and height of a picture in the projector and in the strips, in pixels."""
SNAPSHOTS = 5
"""Snapshots that the projector keeps: the first one and the newest."""


class EmbeddingLogger(L.Callback):
    """Shows, at validation, the images of a bounded sample where the features put them.

    Three ways to look, each from the same images:

    - TensorBoard's projector, for each `TensorBoardLogger`: features with pictures and labels, the first snapshot and
      the newest four.
    - ``<name>/map``, a picture: the images, and points in the colours of their classes, at two principal components,
      t-SNE, or any layout of your own. Needs matplotlib (extra ``demo``).
    - ``<name>/neighbours``, a picture: ``queries`` fixed images with their nearest neighbours (cosine) now, at the
      first measurement and at the last few: green frames are of the query's class, red ones are not.

    Pictures go where those of `ViewLogger` go. The sample is spread evenly over the first validation loader, whose
    features the validation step computes anyway. With ``data``, images and labels come from that loader, which is
    encoded in eval mode at each validation, or at the end of each epoch in a run without validation. Images are known
    by their pixels: queries are found again when the order of the loader changes.

    The run is left as it was, bit for bit. A checkpoint keeps names of pictures, 8 bytes each, so that a resumed run
    goes on with the same queries: at most ``queries`` x (5 x ``neighbours`` + 1). Memory, while a validation runs:
    features of ``samples`` images, and 12 KiB for each; in training none. Cost: rank 0 draws while the others wait,
    `docs/pictures.md` has the time. Images with NaN or infinite features are left out with a warning.

    Args:
        features: Name of one layer, as for `OnlineLinearProbe`.
        data: A loader or a DataModule of its own (the training loader is taken); None: the validation loader.
        labels: As for `OnlineLinearProbe`; None takes the batch contract's, or none where it has no classes.
        class_names: A word for each class; None takes the DataModule's ``class_names`` where it has them, else numbers.
        samples: Images, over all ranks, >= 3.
        every_n_validations: Validations from one measurement to the next, beginning with the first.
        projector: Write for TensorBoard's projector.
        layout: Of the map: "pca", "tsne" (scikit-learn), a function of normalised features (N, F) that returns (N, 2),
            for example of ``umap.UMAP``; None for no map.
        queries: Fixed images whose neighbours are shown; 0 for none.
        neighbours: Of each query, >= 1.
        tokens: As for `OnlineLinearProbe`.
        name: First part of the names of what is shown; must differ between loggers of embeddings.
        png_dir: As for `ViewLogger`.
        channels: As for `ViewLogger`.
        mean: As for `ViewLogger`.
        std: As for `ViewLogger`.

    Raises:
        ValueError: If an argument is out of its range.
        ModuleNotFoundError: If matplotlib or scikit-learn is missing for the map.
    """

    def __init__(
        self,
        features: str = "backbone",
        *,
        data: Any = None,
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
    ) -> None:
        check_at_least("samples", samples, 3)
        check_at_least("every_n_validations", every_n_validations, 1)
        check_at_least("queries", queries, 0)
        check_at_least("neighbours", neighbours, 1)
        check_layout(layout)
        if data is not None:
            check_source("data", data)
        check_word("name", name, "It is the first part of the names of what is shown")
        self.data, self.labels, self.class_names, self.samples = data, labels, class_names, samples
        self.every_n_validations, self.projector, self.layout = every_n_validations, projector, layout
        self.name, self.png_dir = name, png_dir
        self._tap = FeatureHook(features, tokens)
        self._display = Display(channels, mean, std)
        self._strips = Strips(queries, neighbours)
        self._loader: Any = None
        self._validations = 0
        self._warned_of_nan = self._warned_of_queries = False
        self._share: Share | None = None
        self._parts: list[Part] = []

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``, so that a Trainer takes several."""
        return f"EmbeddingLogger[{self.name}]"

    # The hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin anew; a checkpoint that is resumed is loaded after this."""
        if stage == "fit":
            self._validations, self._warned_of_nan, self._warned_of_queries = 0, False, False
            self._strips.clear()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layer: here it exists, wrapped as it will be, in every strategy."""
        self._tap.attach(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say so, if there will be nothing to look at."""
        if not trainer.enable_validation and self.data is None:
            rank_zero_warn(
                f"`{self.name}` looks at validation images, and this run has none: give it `data=`, a loader."
            )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layer and expect the images of the first loader."""
        self._tap.attach(pl_module)
        self._parts, self._share = [], None
        if self.data is None and self._is_due(trainer):
            self._share = Share(self.samples, next(iter(trainer.num_val_batches), 0))

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Expect the features of a batch."""
        if self._share is not None and dataloader_idx == 0:
            self._tap.arm(count_images(batch))

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the features and pictures of the images that are part of the sample."""
        if self._share is None or dataloader_idx != 0:
            return
        with torch.no_grad():
            with trainer.precision_plugin.forward_context():
                complete(trainer, [self._tap], outputs)
            features = self._tap.read(pl_module, outputs)
            wanted = self._share.places(len(features))
            if wanted:
                rows, places = (torch.tensor(numbers) for numbers in zip(*wanted, strict=True))
                self._parts.append(self._part(trainer, features, batch, rows, places))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the images; after the sanity check, whose features are those of no training, nothing is shown."""
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module)
        self._parts, self._share = [], None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the images of ``data`` in a run without validation."""
        if not trainer.enable_validation and self.data is not None:
            self._measure(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hook away."""
        self._tap.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hook away: `teardown` is not called after an exception."""
        self._tap.detach()
        self._parts, self._share = [], None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations, and the names of queries and neighbours."""
        return {"validations": self._validations, "strips": self._strips.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._validations = state_dict["validations"]
        self._strips.load_state_dict(state_dict["strips"])

    # A measurement.

    def _is_due(self, trainer: Any) -> bool:
        fitting = trainer.state.fn == "fit"
        return trainer.sanity_checking or not fitting or self._validations % self.every_n_validations == 0

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        """Gather the images of all ranks, and show them on rank 0."""
        due = self._is_due(trainer)
        self._validations += 1
        if not due:
            return
        if self.data is not None:
            self._parts = self._encode(trainer, pl_module)
        gallery = gather_gallery(self._parts, self.samples)
        if gallery is None:
            return
        finite = torch.isfinite(gallery.features).all(dim=1)
        self._warned_of_nan = self._warned_of_nan or warn_of_nan(self, self._tap.features, finite)
        gallery = gallery.only(finite)
        if len(gallery.names) >= 3:
            with torch.no_grad():
                self._show(trainer, gallery)

    def _show(self, trainer: Any, gallery: Gallery) -> None:
        step, epoch = int(trainer.global_step), int(trainer.current_epoch)
        source = trainer.datamodule if self.data is None else self.data
        names = self.class_names or getattr(source, "class_names", None)
        if self.projector:
            words = None if gallery.labels is None else [class_word(int(label), names) for label in gallery.labels]
            for folder in tensorboard_folders(trainer):
                write_projector(folder, self.name, step, gallery, words, keep=SNAPSHOTS)
        if self.layout is not None:
            picture = draw_map(gallery, names, self.layout, f"{self._tap.features}, epoch {epoch}, step {step}")
            publish(trainer, f"{self.name}/map", picture, self.png_dir)
        if self._strips.queries:
            missing = self._strips.measure(gallery, f"epoch {epoch}")
            if missing and not self._warned_of_queries:
                self._warned_of_queries = True
                rank_zero_warn(
                    f"{type(self).__name__} `{self.name}`: {missing} of the queries are not among the images any more. "
                    "Fix the sample."
                )
            publish(trainer, f"{self.name}/neighbours", self._strips.draw(gallery, names), self.png_dir)

    def _part(self, trainer: Any, features: Tensor, batch: Any, rows: Tensor, places: Tensor) -> Part:
        """Return the features, pictures and labels of some images of a batch."""
        images, _ = split_batch(batch)
        images = images if isinstance(images, Tensor) else images[0]
        if images.ndim != 4:
            hint = "EmbeddingLogger shows images: remove it, or name the images in a dict"
            fail("batch", "hold images (B, C, H, W)", tuple(images.shape), hint)
        pixels = self._display.pixels(images[rows], statistics_of(trainer, training=False))
        labels = self._labels_of(batch)
        return Part(places, features[rows], fitted(pixels, EDGE), None if labels is None else labels[rows].cpu())

    def _labels_of(self, batch: Any) -> Tensor | None:
        if self.labels is not None:
            return read_labels(batch, self.labels, type(self).__name__)
        found = split_batch(batch)[1]
        usable = found is not None and found.ndim == 1 and not found.is_floating_point() and found.dtype != torch.bool
        return found.long() if usable and found is not None else None

    def _encode(self, trainer: Any, pl_module: Any) -> list[Part]:
        """Return this rank's share of the images of ``data``, encoded now."""
        if self._loader is None:
            self._loader = training_loader("data", self.data, trainer)
        parts: list[Part] = []

        def read(features: Tensor, batch: Any, layer: int) -> tuple[Tensor, Tensor]:
            start = sum(len(part.places) for part in parts)
            places = torch.arange(start, start + len(features))
            parts.append(self._part(trainer, features, batch, torch.arange(len(features)), places))
            return features, places

        kept = encoded(trainer, pl_module, [self._tap], self._loader, read, limit=self.samples)
        own = torch.cat(
            [places for _, places in kept[self._tap.features].batches]
        )  # this rank's share of what was read
        return [_rows(part, torch.isin(part.places, own)) for part in parts]


def _rows(part: Part, keep: Tensor) -> Part:
    labels = None if part.labels is None else part.labels[keep]
    return Part(part.places[keep], part.features[keep.to(part.features.device)], part.pictures[keep], labels)
