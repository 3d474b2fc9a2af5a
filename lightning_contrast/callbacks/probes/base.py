"""What the online probes share: they read features and labels beside a run and score them at validation."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_contrast._checks import check_word, fail, require
from lightning_contrast.callbacks.capture.dataloaders import Repeats
from lightning_contrast.callbacks.capture.features import FeatureHook, warn_of_nan
from lightning_contrast.callbacks.capture.forward_pass import complete
from lightning_contrast.callbacks.capture.labels import Labels, find_labels
from lightning_contrast.callbacks.probes.metrics import Scores
from lightning_contrast.callbacks.probes.tasks import Task


class Step(NamedTuple):
    """What a probe learns from: features and targets of the images of one step."""

    features: Tensor
    """(B, F), float32; 0 where they are not finite."""
    labels: Tensor
    """What the task takes, (B, ...), of classes (B,), int64, in 0..num_classes - 1; 0 where not valid."""
    valid: Tensor
    """(B,), False where an image has no label or its features are not finite."""
    finite: Tensor
    """(B,), False where the features are NaN or infinite."""
    layer: str = ""
    """Where the features come from; "" is the first layer."""


class OnlineProbe(L.Callback):
    """Reads features and labels in every step, and logs how good `predict` is at validation and test.

    Args:
        task: What the labels are.
        features: Where the features come from, one name or several, see `FeatureHook`.
        labels: Where the labels come from: None is the batch contract, a str the key of a dict batch, an int the index
            of a tuple or list batch, a callable gets the whole batch.
        name: First part of the names that are logged.
        tokens: What becomes of a token sequence, see `FeatureHook`.
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
        self._taps = {layer: FeatureHook(layer, tokens) for layer in self.layers}
        self._batch_targets: Tensor | None = None
        self._seen: set[str] = set()
        self._scores: dict[int, dict[str, Scores]] = {}
        self._repeats = Repeats([])
        self._warned = False

    @abstractmethod
    def learn(self, step: Step) -> None:
        """Use the features of a training step."""

    @abstractmethod
    def predict(self, features: Tensor, layer: str = "") -> Tensor | None:
        """Return the outputs (B, ...) for a layer's features (B, F), or None where nothing has been learned yet."""

    @abstractmethod
    def new_scores(self, device: torch.device) -> Scores:
        """Return what judges the outputs of one layer for one loader."""

    # The hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse two probes of one name, which would log over each other."""
        others = (c for c in trainer.callbacks if isinstance(c, OnlineProbe) and c is not self)
        if any(other.name == self.name for other in others):
            fail("name", "differ between the probes of a Trainer", self.name, 'Give one of them another, `name="..."`')
        self._seen.clear()
        self._warned = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers: here they exist, wrapped as they will be, in every strategy."""
        self._attach(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the labels and expect their features."""
        self._expect(batch, "training")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Learn, outside autocast and after the optimizer's step."""
        with torch.no_grad():
            for step in self._take(trainer, pl_module, outputs, f"training batch {batch_idx}"):
                self.learn(step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers and begin to count."""
        self._attach(pl_module)
        self._begin(pl_module, trainer.num_val_batches, trainer.val_dataloaders)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers and begin to count."""
        self._attach(pl_module)
        self._begin(pl_module, trainer.num_test_batches, trainer.test_dataloaders)

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
        """Judge the predictions; the sanity check only looks whether features and labels are there."""
        taken = self._take(trainer, pl_module, outputs, f"validation batch {batch_idx}")
        if not trainer.sanity_checking:
            self._count(dataloader_idx, taken)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Judge the predictions."""
        self._count(dataloader_idx, self._take(trainer, pl_module, outputs, f"test batch {batch_idx}"))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log ``<name>/top1`` and so on, in time for ModelCheckpoint and EarlyStopping."""
        if not trainer.sanity_checking:
            self._log_scores(pl_module, "")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log ``<name>/test_top1`` and so on."""
        self._log_scores(pl_module, "test_")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks away."""
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks away: `teardown` is not called after an exception."""
        self._detach()

    # Labels and features of one step.

    def _attach(self, pl_module: Any) -> None:
        for tap in self._taps.values():
            tap.attach(pl_module)

    def _detach(self) -> None:
        for tap in self._taps.values():
            tap.detach()

    def _expect(self, batch: Any, stage: str) -> None:
        self._batch_targets = self._targets_of(batch, stage)
        for tap in self._taps.values():
            tap.arm(len(self._batch_targets))

    def _targets_of(self, batch: Any, stage: str) -> Tensor:
        targets = self.task.targets(find_labels(batch, self.labels, type(self).__name__))
        if targets.device.type == "cpu" or stage not in self._seen:  # later on an accelerator it would cost a sync
            self.task.check(targets)
        return targets

    def _take(self, trainer: Any, pl_module: Any, outputs: Any, where: str) -> list[Step]:
        """Return the features and targets of the images of a step, for each layer."""
        targets, self._batch_targets = self._batch_targets, None
        if targets is None:
            return []
        stage = where.split(maxsplit=1)[0]
        hooks = list(self._taps.values())
        if stage != "training":
            with trainer.precision_plugin.forward_context(), torch.no_grad():
                complete(trainer, hooks, outputs)
        features = [tap.read(pl_module, outputs) for tap in hooks]
        steps = [self._step(*pair, targets, where) for pair in zip(self.layers, features, strict=True)]
        self._seen.add(stage)
        return steps

    def _step(self, layer: str, features: Tensor, targets: Tensor, where: str) -> Step:
        hint = "Mend `labels`: there is one row for each image"
        require(len(features) == len(targets), "labels", f"have {len(features)} rows", len(targets), hint)
        finite = torch.isfinite(features).all(dim=1)
        if not self._warned and (features.device.type == "cpu" or where.split(maxsplit=1)[0] not in self._seen):
            self._warned = warn_of_nan(self, layer, finite, f" in {where}")
        targets = targets.to(features.device)
        valid = finite & self.task.has_target(targets)
        features = features.masked_fill(~finite.unsqueeze(1), 0.0)
        return Step(features, self.task.masked(targets, valid), valid, finite, layer)

    # Scores at validation and test.

    def _begin(self, pl_module: Any, batches: Sequence[int | float], loaders: Any) -> None:
        """Begin new counts, made anew each time: the last ones may be inference tensors."""
        self._repeats = Repeats(loaders)
        self._scores = {
            i: {layer: self.new_scores(pl_module.device) for layer in self.layers}
            for i, number in enumerate(batches)
            if number
        }

    def _count(self, dataloader_idx: int, steps: list[Step]) -> None:
        counts = self._repeats.first_time(dataloader_idx, len(steps[0].valid)) if steps else None
        for step in steps:
            predicted = self.predict(step.features, step.layer)
            if predicted is None:
                self._scores.clear()  # the same on every rank: what has been learned is
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
                        # With several loaders the first one is what a run is judged by.
                        names = [log_key] if place == 0 else []
                        names += [f"{log_key}/dataloader_idx_{index}"] if len(scores) > 1 else []
                        for name in names:
                            pl_module.log(name, value, sync_dist=True, add_dataloader_idx=False)

    def _log_keys(self, layer: str, key: str) -> list[str]:
        """Return the names of a layer's value: the first layer has the probe's own name too."""
        keys = [f"{self.name}/{key}"] if layer == self.layers[0] else []
        return keys if len(self.layers) == 1 else [*keys, f"{self.name}/{layer}/{key}"]
