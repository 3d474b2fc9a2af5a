"""Online zero-shot accuracy of an image-text method."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor

from lightning_contrast._checks import check_templates, check_word, fail, require
from lightning_contrast.callbacks.capture.dataloaders import SamplerPadding
from lightning_contrast.callbacks.capture.forward_pass import extra_pass
from lightning_contrast.callbacks.capture.labels import (
    Labels,
    Source,
    check_place,
    find_images,
    find_labels,
)
from lightning_contrast.callbacks.probes.metrics import MaskedAccuracy
from lightning_contrast.callbacks.probes.tasks import ClassTask
from lightning_contrast.metrics.zero_shot import check_class_names, zero_shot_weights
from lightning_contrast.seeding import derived_seed, isolated


class OnlineZeroShot(L.Callback):
    """Classify validation images by the names of their classes, and log the accuracy.

    The weights are those of `evaluation.zero_shot_weights`, computed at the first batch of each validation with the
    weights that it uses; an image gets the class with the most similar vector. No label is used but to count. It costs
    one pass of the text tower over the sentences, and one of the image tower per batch.

    Logged: ``<name>/top1`` at validation, ``<name>/test_top1`` at test, over all loaders; with 5 classes or more also
    ``top5``. The run is not changed.

    Args:
        class_names: The C names in the order of the labels; all different.
        templates: Sentences with ``{}`` for the name.
        labels: Where the labels of a batch are, as in `OnlineLinearProbe`; images with the label -1 are left out.
        images: Where the images are, in the same way.
        name: Prefix of the log keys; must differ between callbacks.

    Raises:
        TypeError: If an argument has the wrong type; in `setup`, if the module has no ``encode_text`` and
            ``encode_image``.
        ValueError: If class names repeat, a template has no ``{}``, or a label is not in 0..C-1.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = ("{}",),
        labels: Labels = None,
        images: Source = None,
        name: str = "zero_shot",
    ) -> None:
        self.class_names, self.templates = check_class_names(class_names), check_templates(templates)
        check_place("labels", labels)
        check_place("images", images)
        check_word("name", name)
        self.labels, self.images, self.name = labels, images, name
        self._task = ClassTask(len(self.class_names))
        self._ranks = (1, 5) if len(self.class_names) >= 5 else (1,)
        self._padding = SamplerPadding([])
        self._weights: Tensor | None = None
        self._scores: dict[int, MaskedAccuracy] = {}

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``, which allows several in a Trainer."""
        return f"OnlineZeroShot[{self.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the module and the name."""
        for method in ("encode_text", "encode_image"):
            if not callable(getattr(pl_module, method, None)):
                hint = "Train an image-text method such as `CLIP`, or define it"
                fail("pl_module", f"have a method `{method}`", type(pl_module).__name__, hint, TypeError)
        others = (c for c in trainer.callbacks if isinstance(c, OnlineZeroShot) and c is not self)
        if any(other.name == self.name for other in others):
            fail("name", "differ between the callbacks of a Trainer", self.name, 'Give one another, `name="..."`')

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the metrics."""
        self._begin(pl_module, trainer.val_dataloaders)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the metrics."""
        self._begin(pl_module, trainer.test_dataloaders)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the images of a batch; the sanity check only runs the towers."""
        self._count(trainer, pl_module, batch, dataloader_idx)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the images of a batch."""
        self._count(trainer, pl_module, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log ``<name>/top1``, before ModelCheckpoint and EarlyStopping read it."""
        if not trainer.sanity_checking:
            self._log(pl_module, "")
        self._weights = None

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log ``<name>/test_top1``."""
        self._log(pl_module, "test_")
        self._weights = None

    def _begin(self, pl_module: Any, loaders: Any) -> None:
        self._weights, self._padding = None, SamplerPadding(loaders)
        self._scores = {rank: MaskedAccuracy().to(pl_module.device) for rank in self._ranks}

    def _log(self, pl_module: Any, prefix: str) -> None:
        for rank, accuracy in self._scores.items():
            pl_module.log(
                f"{self.name}/{prefix}top{rank}", accuracy.compute(), sync_dist=True, add_dataloader_idx=False
            )

    def _count(self, trainer: Any, pl_module: Any, batch: Any, dataloader_idx: int) -> None:
        targets = self._task.targets(find_labels(batch, self.labels, type(self).__name__))
        if targets.device.type == "cpu" or self._weights is None:  # each check synchronizes an accelerator
            self._task.check(targets)
        images = find_images(batch, self.images)
        device = trainer.strategy.root_device
        with extra_pass(trainer, pl_module, []), isolated(derived_seed(0), device):
            with trainer.precision_plugin.forward_context():
                if self._weights is None:
                    self._weights = zero_shot_weights(pl_module, self.class_names, self.templates)
                embeddings = pl_module.encode_image(images)
            similarity = embeddings.float() @ self._weights.T  # (B, C)
        hint = "Check `labels`: there is one row per image"
        require(len(similarity) == len(targets), "labels", f"have {len(similarity)} rows", len(targets), hint)
        targets = targets.to(similarity.device)
        valid = self._task.has_target(targets) & similarity.isfinite().all(1)
        counts = self._padding.mask(dataloader_idx, len(valid))
        valid = valid if counts is None else valid & counts.to(valid.device)
        best = similarity.topk(self._ranks[-1], dim=1).indices
        for rank, accuracy in self._scores.items():
            accuracy.update((best[:, :rank] == targets.unsqueeze(1)).any(1), valid)
