"""What the online probes share: they read features and labels beside a run and score them at validation."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.callbacks._features import FeatureTap
from lightning_contrast.callbacks._probe_share import Share
from lightning_contrast.contracts import split_batch

Labels: TypeAlias = str | int | Callable[[Any], Tensor] | None
IGNORED = -1
"""The label of an image that has none."""


class Step(NamedTuple):
    """What a probe learns from: features and labels of the images of one step."""

    features: Tensor
    """(B, F), float32; 0 where they are not finite."""
    labels: Tensor
    """(B,), int64, in 0..num_classes - 1; 0 where not valid."""
    valid: Tensor
    """(B,), False where an image has no label or its features are not finite."""
    finite: Tensor
    """(B,), False where the features are NaN or infinite."""


class OnlineProbe(L.Callback):
    """Reads features and labels in every step, and logs the accuracy of `predict` at validation and test.

    Args:
        num_classes: Number of classes.
        features: Where the features come from, see `FeatureTap`.
        labels: Where the labels come from: None is the batch contract, a str the key of a dict batch, an int the index
            of a tuple or list batch, a callable gets the whole batch.
        name: First part of the names that are logged.
        tokens: What becomes of a token sequence, see `FeatureTap`.
    """

    def __init__(self, num_classes: int, *, features: str, labels: Labels, name: str, tokens: str) -> None:
        check_at_least("num_classes", num_classes, 2)
        if not (labels is None or isinstance(labels, str | int) or callable(labels)) or isinstance(labels, bool):
            mend = "Give the key or the index of the labels in a batch, or a function of the batch"
            fail("labels", "be None, a str, an int or a callable", labels, mend, TypeError)
        if not isinstance(name, str) or not name:
            fail("name", "be a word", name, "It is the first part of what is logged")
        self.num_classes, self.labels, self.name = num_classes, labels, name
        self._tap = FeatureTap(features, tokens)
        self._batch_labels: Tensor | None = None
        self._seen: set[str] = set()
        self._scores: dict[int, Share] = {}
        self._warned = False

    @abstractmethod
    def learn(self, step: Step) -> None:
        """Use the features of a training step."""

    @abstractmethod
    def predict(self, features: Tensor) -> Tensor | None:
        """Return the predicted classes (B,) of features (B, F), or None where nothing has been learned yet."""

    # The hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse two probes of one name, which would log over each other."""
        others = (c for c in trainer.callbacks if isinstance(c, OnlineProbe) and c is not self)
        if any(other.name == self.name for other in others):
            fail("name", "differ between the probes of a Trainer", self.name, 'Give one of them another, `name="..."`')
        self._seen.clear()
        self._warned = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layer: here it exists, wrapped as it will be, in every strategy."""
        self._tap.attach(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the labels and expect their features."""
        self._expect(batch, "training")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Learn, outside autocast and after the optimizer's step."""
        if self._batch_labels is None:
            return
        with torch.no_grad():
            self.learn(self._take(pl_module, outputs, f"training batch {batch_idx}"))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layer and begin to count."""
        self._tap.attach(pl_module)
        self._begin(pl_module, trainer.num_val_batches)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layer and begin to count."""
        self._tap.attach(pl_module)
        self._begin(pl_module, trainer.num_test_batches)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read the labels and expect their features."""
        self._expect(batch, "validation")

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read the labels and expect their features."""
        self._expect(batch, "test")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the right predictions; the sanity check only looks whether features and labels are there."""
        taken = self._take(pl_module, outputs, f"validation batch {batch_idx}")
        if not trainer.sanity_checking:
            self._count(dataloader_idx, taken)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the right predictions."""
        self._count(dataloader_idx, self._take(pl_module, outputs, f"test batch {batch_idx}"))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log ``<name>/top1``, in time for ModelCheckpoint and EarlyStopping."""
        if not trainer.sanity_checking:
            self._log_scores(pl_module, f"{self.name}/top1")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log ``<name>/test_top1``."""
        self._log_scores(pl_module, f"{self.name}/test_top1")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hook away."""
        self._tap.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hook away: `teardown` is not called after an exception."""
        self._tap.detach()

    # Labels and features of one step.

    def _expect(self, batch: Any, stage: str) -> None:
        labels = read_labels(batch, self.labels, type(self).__name__)
        if labels.device.type == "cpu" or stage not in self._seen:  # later on an accelerator it would cost a sync
            self._check_range(labels)
        self._batch_labels = labels
        self._tap.arm(len(labels))

    def _take(self, pl_module: Any, outputs: Any, where: str) -> Step:
        """Return the features and labels of the images of a step."""
        labels, self._batch_labels = self._batch_labels, None
        assert labels is not None  # set in the hook that opens every step
        features = self._tap.read(pl_module, outputs)
        finite = torch.isfinite(features).all(dim=1)
        stage = where.split(maxsplit=1)[0]
        if features.device.type == "cpu" or stage not in self._seen:
            self._warn_of_nan(finite, where)
        self._seen.add(stage)
        labels = labels.to(features.device)
        valid = finite & (labels >= 0) & (labels < self.num_classes)
        features = features.masked_fill(~finite.unsqueeze(1), 0.0)
        return Step(features, labels.masked_fill(~valid, 0), valid, finite)

    def _check_range(self, labels: Tensor) -> None:
        if len(labels) == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(labels))
        rule = f"lie in 0..{self.num_classes - 1}, or be {IGNORED} for images without a label"
        fits = low >= IGNORED and high < self.num_classes
        require(fits, "labels", rule, low if low < IGNORED else high, "Set `num_classes` to the number of classes")

    def _warn_of_nan(self, finite: Tensor, where: str) -> None:
        bad = len(finite) - int(finite.sum())
        if bad and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{type(self).__name__}: the features {self._tap.features!r} of {bad} of {len(finite)} images are NaN "
                f"or infinite in {where}; `{self.name}` leaves such images out. Look at the loss and the learning rate."
            )

    # Scores at validation and test.

    def _begin(self, pl_module: Any, batches: Sequence[int | float]) -> None:
        """Begin new counts, made anew each time: the last ones may be inference tensors."""
        self._scores = {i: Share().to(pl_module.device) for i, number in enumerate(batches) if number}

    def _count(self, dataloader_idx: int, step: Step) -> None:
        predicted = self.predict(step.features)
        if predicted is None:
            self._scores.clear()  # the same on every rank: what has been learned is
        elif dataloader_idx in self._scores:
            score = self._scores[dataloader_idx].to(step.features.device)
            score.update(predicted == step.labels, step.valid)

    def _log_scores(self, pl_module: Any, key: str) -> None:
        scores, self._scores = self._scores, {}
        for place, (index, score) in enumerate(sorted(scores.items())):
            value = score.compute()
            if place == 0:  # with several loaders the first one is what a run is judged by
                pl_module.log(key, value, sync_dist=True, add_dataloader_idx=False)
            if len(scores) > 1:
                name = f"{key}/dataloader_idx_{index}"
                pl_module.log(name, value, sync_dist=True, add_dataloader_idx=False)


def read_labels(batch: Any, source: Labels, owner: str) -> Tensor:
    """Return the labels (B,) of a batch, int64.

    Args:
        batch: What the loader gave, with views in the place of images or not.
        source: See `OnlineProbe`.
        owner: Name of the callback, for messages.

    Raises:
        TypeError: If what stands there is not a tensor of integers.
        ValueError: If there is nothing.
    """
    mend = f"{owner} needs labels: let the loader yield (images, labels), or say where they are with `labels=`"
    found: Any
    if callable(source):
        found = source(batch)
    elif source is None:
        found = split_batch(batch)[1]
        if found is None:
            fail("labels", "be in the batch", type(batch).__name__, mend)
    elif isinstance(source, str):
        if not isinstance(batch, Mapping) or source not in batch:
            keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            fail("labels", f"name a key of the batch ({source!r} is none)", keys, mend)
        found = batch[source]
    else:
        size = len(batch) if isinstance(batch, Sequence) else 0
        require(-size <= source < size, "labels", f"be an index into a batch of {size} items", source, mend)
        found = batch[source]
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        what = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
        fail("labels", "be a tensor of integer classes", what, "Give one class number for each image", TypeError)
    require(
        found.ndim == 1, "labels", "have the shape (B,)", tuple(found.shape), "Give one class number for each image"
    )
    return found.long()
