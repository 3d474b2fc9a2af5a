"""Base class of the online probes, which read features and labels during a run and evaluate them at validation."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.callbacks.capture.dataloaders import (
    SamplerPadding,
)
from lightning_contrast.callbacks.capture.features import FeatureHook
from lightning_contrast.callbacks.capture.forward_pass import MOMENTUM, complete
from lightning_contrast.callbacks.capture.labels import (
    find_images,
)
from lightning_contrast.callbacks.probes.bank import WHOLE_IMAGES, BankedProbe, BatchSource, Step
from lightning_contrast.callbacks.probes.metrics import Scores


class OnlineProbe(BankedProbe):
    """Reads features and labels in every step, and logs the quality of `predict` at validation and test.

    The arguments are those of `BankedProbe`.
    """

    @abstractmethod
    def judge_with(self, trainer: Any, pl_module: Any) -> None:
        """Prepare `predict` for an evaluation, before its first batch and with the weights that its batches see."""

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
        self._said.clear()
        self._warned = self._compared = False
        self._loader = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers, which every strategy has created and wrapped by now.

        Raises:
            ValueError: If ``bank="train"`` would hold features that validation does not have.
        """
        self._attach(pl_module)
        self._check_classes(trainer)
        if not self.encodes and self.dataloader is None:
            hint = 'Use `bank="fresh"`, which encodes whole images'
            whole = getattr(pl_module, WHOLE_IMAGES, True)
            kind = type(pl_module).__name__
            require(whole, "bank", f'not be "train" for {kind}, whose steps encode parts of images', "train", hint)
            teacher = [layer for layer in self.layers if layer.startswith(MOMENTUM)]
            rule = 'name no momentum network with `bank="train"`: its rows in a step may be those of other images'
            require(not teacher, "features", rule, teacher, 'Use `bank="fresh"`')

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn of what keeps a bank from being encoded, or from being comparable with validation."""
        self._trained_on = trainer.train_dataloader
        if self.encodes:
            self._source(trainer)
            given = [c for c in trainer.callbacks if getattr(c, "evaluate", True) is False and hasattr(c, "policy")]
            if given and self.dataloader is None:
                self.say_once(
                    f"`{type(given[0]).__name__}(evaluate=False)` leaves the images of the bank as the training loader "
                    "yields them; validation images must be prepared in the same way. Else give a `dataloader`."
                )
        elif any(base.__name__ == "WeightAveraging" for c in trainer.callbacks for base in type(c).__mro__):
            self.say_once(
                'with `bank="train"` it compares features of the training weights with those of the averaged weights '
                'that validation uses. Use `bank="fresh"`.'
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the labels and arm the hooks."""
        self._batch_targets = None
        if getattr(pl_module, WHOLE_IMAGES, True):
            self._expect(batch, BatchSource.TRAINING)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Learn from the step, outside autocast and after the optimizer step."""
        with torch.no_grad():
            for step in self._take(trainer, pl_module, outputs, batch, BatchSource.TRAINING, batch_idx):
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
        if not trainer.sanity_checking:
            self._prepare(trainer, pl_module)
        self._expect(batch, BatchSource.VALIDATION)

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read the labels and arm the hooks."""
        self._prepare(trainer, pl_module)
        self._expect(batch, BatchSource.TEST)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics; the sanity check only checks that there are features and labels."""
        taken = self._take(trainer, pl_module, outputs, batch, BatchSource.VALIDATION, batch_idx)
        if not trainer.sanity_checking:
            self._count(dataloader_idx, taken)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics."""
        self._count(dataloader_idx, self._take(trainer, pl_module, outputs, batch, BatchSource.TEST, batch_idx))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log ``<name>/top1`` and the other metrics, before ModelCheckpoint and EarlyStopping read them."""
        if not trainer.sanity_checking:
            self._log_scores(pl_module, "")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log ``<name>/test_top1`` and the other metrics."""
        self._log_scores(pl_module, "test_")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Free the bank."""
        self._banks = {}

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Free the bank."""
        self._banks = {}

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

    def _take(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, source: BatchSource, batch_idx: int
    ) -> list[Step]:
        """Return the features and targets of a step, per layer; empty if the step had no labels."""
        targets, self._batch_targets = self._batch_targets, None
        if targets is None:
            return []
        hooks = self._hooks
        if source is BatchSource.TRAINING and self.encodes:  # a layer that the steps do not call is judged by its bank
            hooks = {layer: hook for layer, hook in hooks.items() if self._learns_in_steps(hook, outputs)}
        elif source is not BatchSource.TRAINING:
            with trainer.precision_plugin.forward_context(), torch.no_grad():
                complete(trainer, pl_module, list(hooks.values()), outputs, lambda: find_images(batch, self.images))
        features = {layer: hook.read(pl_module, outputs) for layer, hook in hooks.items()}
        steps = [self._step(layer, found, targets, source, batch_idx) for layer, found in features.items()]
        if source is not BatchSource.TRAINING and self.encodes and not self._compared:
            self._compare(trainer, pl_module, batch, list(features.values()))
        self._checked.add(source)
        return steps

    def _learns_in_steps(self, hook: FeatureHook, outputs: Any) -> bool:
        return hook.called(outputs) and not hook.features.startswith(MOMENTUM)

    # Metrics at validation and test.

    def _prepare(self, trainer: Any, pl_module: Any) -> None:
        if not self._ready:
            self._ready = True
            self.judge_with(trainer, pl_module)

    def _begin(self, pl_module: Any, batches: Sequence[int | float], loaders: Any) -> None:
        """Create new metrics: the states of the last ones may be inference tensors."""
        self._ready, self._banks = False, {}
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
        many, place = len(scores) > 1, 0
        for index, of_layers in sorted(scores.items()):
            values = {layer: score.compute() for layer, score in of_layers.items()}
            if many and all(value.isnan() for of_layer in values.values() for value in of_layer.values()):
                self.say_once(f"no image of validation loader {index} has a label; nothing is logged for it.")
                continue
            for layer, of_layer in values.items():
                for key, value in of_layer.items():
                    *folder, word = key.split("/")
                    for log_key in self._log_keys(layer, "/".join([*folder, prefix + word])):
                        # The first of several loaders with labels has the key without an index, which a run monitors.
                        names = [log_key] if place == 0 else []
                        names += [f"{log_key}/dataloader_idx_{index}"] if many else []
                        for name in names:
                            pl_module.log(name, value, sync_dist=True, add_dataloader_idx=False)
            place += 1

    def _log_keys(self, layer: str, key: str) -> list[str]:
        """Return the log keys of a layer's value: the first layer has one without the layer's name too."""
        keys = [f"{self.name}/{key}"] if layer == self.layers[0] else []
        return keys if len(self.layers) == 1 else [*keys, f"{self.name}/{layer}/{key}"]
