"""Base class of the online probes, which read features and labels during a run and evaluate them at validation."""

from abc import abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_contrast._checks import check_word, fail, require
from lightning_contrast.callbacks.capture.dataloaders import SamplerPadding
from lightning_contrast.callbacks.capture.features import FeatureHook, warn_of_nan
from lightning_contrast.callbacks.capture.forward_pass import complete
from lightning_contrast.callbacks.capture.labels import Labels, find_labels
from lightning_contrast.callbacks.probes.metrics import Scores
from lightning_contrast.callbacks.probes.tasks import Task


class BatchSource(Enum):
    """Where a batch of labeled images comes from; the value names it in messages."""

    TRAINING = "training"
    VALIDATION = "validation"
    TEST = "test"
    DATALOADER = "`dataloader`"
    BANK = "bank"


class Step(NamedTuple):
    """Features and targets of the images of one step, for one layer."""

    features: Tensor
    """``(B, F)``, float32; 0 where they are not finite."""
    labels: Tensor
    """Targets of the task, ``(B, ...)``; meaningless where not valid."""
    valid: Tensor
    """``(B,)``, bool; False where an image has no label or its features are not finite."""
    finite: Tensor
    """``(B,)``, bool; False where the features are NaN or infinite."""
    layer: str = ""
    """Layer of the features; "" is the first layer."""


class OnlineProbe(L.Callback):
    """Reads features and labels in every step, and logs the quality of `predict` at validation and test.

    Args:
        task: Targets, metrics and loss.
        features: One or several names of layers, see `FeatureHook`.
        labels: Where the labels are: None follows the batch contract, a str is the key of a dict batch, an int the
            index into a tuple or list batch, a callable is applied to the whole batch.
        name: Prefix of the log keys.
        tokens: Pooling of token sequences, see `FeatureHook`.

    Raises:
        TypeError: If ``labels`` or ``features`` have the wrong type.
        ValueError: If ``name`` is empty, or layers are missing or repeated.
    """

    def __init__(self, task: Task, *, features: str | Sequence[str], labels: Labels, name: str, tokens: str) -> None:
        if not (labels is None or isinstance(labels, str | int) or callable(labels)) or isinstance(labels, bool):
            hint = "Give the key or the index of the labels in a batch, or a function of the batch"
            fail("labels", "be None, a str, an int or a callable", labels, hint, TypeError)
        check_word("name", name)
        self.task, self.num_classes, self.labels, self.name = task, task.outputs, labels, name
        self.layers = tuple(features) if isinstance(features, list | tuple) else (features,)
        hint = 'Give ["backbone", "projector"], for example'
        require(len(set(self.layers)) == len(self.layers) > 0, "features", "name different layers", features, hint)
        self._hooks = {layer: FeatureHook(layer, tokens) for layer in self.layers}
        self._batch_targets: Tensor | None = None
        self._checked: set[BatchSource] = set()  # sources whose first batch was checked
        self._scores: dict[int, dict[str, Scores]] = {}
        self._padding = SamplerPadding([])
        self._warned = False

    @abstractmethod
    def learn(self, step: Step) -> None:
        """Use the features of a training step."""

    @abstractmethod
    def predict(self, features: Tensor, layer: str = "") -> Tensor | None:
        """Return the outputs ``(B, ...)`` for features ``(B, F)`` of a layer, or None before anything was learned."""

    @abstractmethod
    def new_scores(self, device: torch.device) -> Scores:
        """Return new metrics for the outputs of one layer on one loader."""

    # Hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse two probes with the same name, whose log keys would collide."""
        others = (c for c in trainer.callbacks if isinstance(c, OnlineProbe) and c is not self)
        if any(other.name == self.name for other in others):
            fail("name", "differ between the probes of a Trainer", self.name, 'Give one of them another, `name="..."`')
        self._checked.clear()
        self._warned = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers, which every strategy has created and wrapped by now."""
        self._attach(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the labels and arm the hooks."""
        self._expect(batch, BatchSource.TRAINING)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Learn from the step, outside autocast and after the optimizer step."""
        with torch.no_grad():
            for step in self._take(trainer, pl_module, outputs, BatchSource.TRAINING, batch_idx):
                self.learn(step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers and reset the metrics."""
        self._attach(pl_module)
        self._begin(pl_module, trainer.num_val_batches, trainer.val_dataloaders)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers and reset the metrics."""
        self._attach(pl_module)
        self._begin(pl_module, trainer.num_test_batches, trainer.test_dataloaders)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read the labels and arm the hooks."""
        self._expect(batch, BatchSource.VALIDATION)

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read the labels and arm the hooks."""
        self._expect(batch, BatchSource.TEST)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics; the sanity check only checks that there are features and labels."""
        taken = self._take(trainer, pl_module, outputs, BatchSource.VALIDATION, batch_idx)
        if not trainer.sanity_checking:
            self._count(dataloader_idx, taken)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics."""
        self._count(dataloader_idx, self._take(trainer, pl_module, outputs, BatchSource.TEST, batch_idx))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log ``<name>/top1`` and the other metrics, before ModelCheckpoint and EarlyStopping read them."""
        if not trainer.sanity_checking:
            self._log_scores(pl_module, "")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log ``<name>/test_top1`` and the other metrics."""
        self._log_scores(pl_module, "test_")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the hooks."""
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks: `teardown` is not called after an exception."""
        self._detach()

    # Labels and features of one step.

    def _attach(self, pl_module: Any) -> None:
        for hook in self._hooks.values():
            hook.attach(pl_module)

    def _detach(self) -> None:
        for hook in self._hooks.values():
            hook.detach()

    def _expect(self, batch: Any, source: BatchSource) -> None:
        self._batch_targets = self._targets_of(batch, source)
        for hook in self._hooks.values():
            hook.arm(len(self._batch_targets))

    def _targets_of(self, batch: Any, source: BatchSource) -> Tensor:
        targets = self.task.targets(find_labels(batch, self.labels, type(self).__name__))
        if targets.device.type == "cpu" or source not in self._checked:  # each check synchronizes an accelerator
            self.task.check(targets)
        return targets

    def _take(self, trainer: Any, pl_module: Any, outputs: Any, source: BatchSource, batch_idx: int) -> list[Step]:
        """Return the features and targets of a step, per layer; empty if the step had no labels."""
        targets, self._batch_targets = self._batch_targets, None
        if targets is None:
            return []
        hooks = list(self._hooks.values())
        if source is not BatchSource.TRAINING:
            with trainer.precision_plugin.forward_context(), torch.no_grad():
                complete(trainer, hooks, outputs)
        features = [hook.read(pl_module, outputs) for hook in hooks]
        steps = [self._step(*pair, targets, source, batch_idx) for pair in zip(self.layers, features, strict=True)]
        self._checked.add(source)
        return steps

    def _step(
        self, layer: str, features: Tensor, targets: Tensor, source: BatchSource, batch_idx: int | None = None
    ) -> Step:
        hint = "Check `labels`: there is one row per image"
        require(len(features) == len(targets), "labels", f"have {len(features)} rows", len(targets), hint)
        # The largest absolute value is NaN or infinite if any value is, and costs one kernel
        finite = torch.linalg.vector_norm(features, float("inf"), dim=1) < float("inf")
        if not self._warned and (features.device.type == "cpu" or source not in self._checked):
            place = f" in {source.value}" if batch_idx is None else f" in {source.value} batch {batch_idx}"
            self._warned = warn_of_nan(self, layer, finite, place)
        targets = targets.to(features.device)
        valid = finite & self.task.has_target(targets)
        features = features.masked_fill(~finite.unsqueeze(1), 0.0)
        return Step(features, targets, valid, finite, layer)

    # Metrics at validation and test.

    def _begin(self, pl_module: Any, batches: Sequence[int | float], loaders: Any) -> None:
        """Create new metrics: the states of the last ones may be inference tensors."""
        self._padding = SamplerPadding(loaders)
        self._scores = {
            i: {layer: self.new_scores(pl_module.device) for layer in self.layers}
            for i, number in enumerate(batches)
            if number
        }

    def _count(self, dataloader_idx: int, steps: list[Step]) -> None:
        counts = self._padding.mask(dataloader_idx, len(steps[0].valid)) if steps else None
        for step in steps:
            predicted = self.predict(step.features, step.layer)
            if predicted is None:
                self._scores.clear()  # on every rank, since all have learned the same
            elif dataloader_idx in self._scores:
                valid = step.valid if counts is None else step.valid & counts.to(step.valid.device)
                self._scores[dataloader_idx][step.layer].update(predicted, step.labels, valid)

    def _log_scores(self, pl_module: Any, prefix: str) -> None:
        scores, self._scores = self._scores, {}
        for place, (index, of_layers) in enumerate(sorted(scores.items())):
            for layer, score in of_layers.items():
                for key, value in score.compute().items():
                    *folder, word = key.split("/")
                    for log_key in self._log_keys(layer, "/".join([*folder, prefix + word])):
                        # The first of several loaders has the key without an index, which a run monitors.
                        names = [log_key] if place == 0 else []
                        names += [f"{log_key}/dataloader_idx_{index}"] if len(scores) > 1 else []
                        for name in names:
                            pl_module.log(name, value, sync_dist=True, add_dataloader_idx=False)

    def _log_keys(self, layer: str, key: str) -> list[str]:
        """Return the log keys of a layer's value: the first layer has one without the layer's name too."""
        keys = [f"{self.name}/{key}"] if layer == self.layers[0] else []
        return keys if len(self.layers) == 1 else [*keys, f"{self.name}/{layer}/{key}"]
