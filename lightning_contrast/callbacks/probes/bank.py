"""The bank of an online probe: labeled images that are encoded at validation, once for all probes of a Trainer."""

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, check_word, fail, require
from lightning_contrast.callbacks.capture.dataloaders import (
    SamplerPadding,
    check_source,
    data_module_loader,
    training_loader,
)
from lightning_contrast.callbacks.capture.feature_bank import EncodedRows, LabeledFeatures, encoded, gathered
from lightning_contrast.callbacks.capture.features import FeatureHook, warn_of_nan
from lightning_contrast.callbacks.capture.forward_pass import encode_images, extra_pass
from lightning_contrast.callbacks.capture.labels import (
    Labels,
    Source,
    UnreadableBatchError,
    check_place,
    find_images,
    find_labels,
)
from lightning_contrast.callbacks.capture.sampling import SEED, is_map_style
from lightning_contrast.callbacks.probes.metrics import Scores
from lightning_contrast.callbacks.probes.tasks import ClassTask, Task
from lightning_contrast.contracts import is_views
from lightning_contrast.seeding import derived_seed, isolated

MAX_BANK = 65_536
"""Default of ``max_bank``: the whole set of CIFAR-10, a twentieth of ImageNet."""

WHOLE_IMAGES = "encodes_whole_images"
"""Attribute of a module; False if its step output ``"features"`` belongs to parts of the images."""

TOLERANCE = 0.05
"""Largest relative difference between the features of a validation step and those of a bank of the same images."""


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


class BankedProbe(L.Callback):
    """Encodes the bank of an evaluation, and reads the targets of batches.

    Args:
        task: Targets, metrics and loss.
        features: One or several names of layers, see `FeatureHook`.
        labels: Where the labels are: None follows the batch contract, a str is the key of a dict batch, an int the
            index into a tuple or list batch, a callable is applied to the whole batch.
        images: Where the images are, in the same way.
        name: Prefix of the log keys.
        tokens: Pooling of token sequences, see `FeatureHook`.
        bank: "fresh" compares with images that are encoded at validation, "train" with what the steps gave.
        max_bank: Maximum number of images of a bank over all ranks, >= 1.
        dataloader: Source of labeled images instead of the run's training loader, or None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or layers are missing or repeated.
    """

    def __init__(
        self,
        task: Task,
        *,
        features: str | Sequence[str],
        labels: Labels,
        images: Source,
        name: str,
        tokens: str,
        bank: str,
        max_bank: int,
        dataloader: Any,
    ) -> None:
        check_place("labels", labels)
        check_place("images", images)
        if not isinstance(bank, str):
            fail("bank", 'be "train" or "fresh"', type(bank).__name__, "Give a loader as `dataloader`", TypeError)
        check_choice("bank", bank, ("train", "fresh"))
        check_at_least("max_bank", max_bank, 1)
        if dataloader is not None:
            check_source("dataloader", dataloader)
        self.images, self.bank, self.max_bank, self.dataloader = images, bank, max_bank, dataloader
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
        self._said: set[str] = set()
        self._loader: Any = None
        self._trained_on: Any = None  # which a test after the fit encodes
        self._ready = self._compared = False
        self._banks: dict[str, LabeledFeatures | None] = {}

    @property
    def encodes(self) -> bool:
        """Whether validation compares with a bank of images that is encoded then."""
        return self.bank == "fresh"

    def _targets_of(self, batch: Any, source: BatchSource) -> Tensor:
        targets = self.task.targets(find_labels(batch, self.labels, type(self).__name__, rows=self.task.rows))
        if targets.device.type == "cpu" or source not in self._checked:  # each check synchronizes an accelerator
            self.task.check(targets)
        return targets

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

    def _compare(self, trainer: Any, pl_module: Any, batch: Any, features: list[Tensor]) -> None:
        """Check once that the features of an evaluation step are those of the pass that encodes the bank."""
        self._compared = True
        hooks, device = list(self._hooks.values()), trainer.strategy.root_device
        try:
            images = find_images(batch, self.images)
        except UnreadableBatchError as error:
            self.say_once(f"{error}")
            return
        try:
            with extra_pass(trainer, pl_module, hooks), isolated(derived_seed(SEED), device):
                again = encode_images(trainer, pl_module, hooks, images)
        except RuntimeError as error:  # the step converts its images, to another dtype for example
            self.say_once(f"`forward` does not take the images of the validation batch, only its step does: {error}")
            return
        for layer, step, other in zip(self.layers, features, again, strict=True):
            widths = (step.shape[1], other.shape[1])
            hint = "Name a layer that `forward` and the validation step both call"
            require(widths[0] == widths[1], "features", "be as wide at validation as in the bank", widths, hint)
            if len(step) == 0 or not (step.isfinite().all() and other.isfinite().all()):
                continue
            difference = float((step - other).norm() / step.norm().clamp(min=torch.finfo(step.dtype).tiny))
            rule = f"be the same in the validation step as in `forward`, which encodes the bank ({layer!r})"
            hint += ', or use `bank="train"`'
            require(difference < TOLERANCE, "features", rule, f"a relative difference of {difference:.2g}", hint)

    # The bank of an evaluation.

    def say_once(self, text: str) -> None:
        """Warn on rank 0, once in a run, with the name of the probe."""
        if text not in self._said:
            self._said.add(text)
            rank_zero_warn(f"`{self.name}`: {text}")

    def _check_classes(self, trainer: Any) -> None:
        given = getattr(trainer.datamodule, "num_classes", None)
        own = isinstance(self.task, ClassTask) and self.labels is None and self.dataloader is None
        if own and isinstance(given, int) and self.num_classes > given:
            kind = type(trainer.datamodule).__name__
            self.say_once(f"`num_classes` is {self.num_classes}, and {kind} has {given} classes.")

    def _source(self, trainer: Any) -> tuple[Any, bool] | None:
        """Return the loader of the bank and whether all ranks have the same; None, with a warning, if there is none."""
        if self._loader is None and self.dataloader is not None:
            self._loader = training_loader("dataloader", self.dataloader, trainer), True
        if self._loader is None:
            loader = self._trained_on if trainer.train_dataloader is None else trainer.train_dataloader
            equal = loader is None  # a DataModule's, which Lightning has not divided among the ranks
            loader = data_module_loader(trainer) if equal else loader
            if loader is None:
                self.say_once(
                    "there is no training set to encode for a bank. Pass the `datamodule` to the Trainer, or give a "
                    "loader of labeled images as `dataloader`."
                )
            elif not is_map_style(loader):
                self.say_once(
                    f"the training loader, a {type(loader).__name__}, has no dataset of known length to encode for a "
                    "bank. Give a loader of labeled images as `dataloader`."
                )
            else:
                self._loader = loader, equal
        return self._loader

    def _encode_bank(self, trainer: Any, pl_module: Any) -> None:
        """Encode the bank of each layer, unless another probe has just done so, and gather it on all ranks."""
        self._banks = self._shared_banks(trainer)
        hooks = [hook for layer, hook in self._hooks.items() if layer not in self._banks]
        source = self._source(trainer) if hooks else None
        if source is None:
            return
        loader, equal = source
        self._checked.discard(BatchSource.BANK)

        def read(features: Tensor, batch: Any, layer: int) -> EncodedRows:
            if is_views(batch[0] if isinstance(batch, list | tuple) and batch else None):
                self.say_once("the loader of the bank yields views, so the bank holds augmented images.")
            targets = self._targets_of(batch, BatchSource.BANK)
            step = self._step(hooks[layer].features, features, targets, BatchSource.BANK)
            self._checked.add(BatchSource.BANK)
            return EncodedRows(step.features, step.labels, step.valid)

        try:
            parts = encoded(
                trainer, pl_module, hooks, loader, read, limit=self.max_bank, images=self.images, equal=equal
            )
        except UnreadableBatchError as error:
            self.say_once(f"{error}")
            return
        self._banks |= {layer: gathered(part, pl_module.device) for layer, part in parts.items()}
        if not any(self._banks.values()):
            self.say_once("no image of the bank has a label and finite features.")

    def _shared_banks(self, trainer: Any) -> dict[str, LabeledFeatures | None]:
        """Return the banks that other probes have encoded for this evaluation from the same images and labels."""
        found: dict[str, LabeledFeatures | None] = {}
        for other in trainer.callbacks:
            if isinstance(other, BankedProbe) and other is not self and other._bank_key() == self._bank_key():
                found |= {layer: bank for layer, bank in other._banks.items() if layer in self._hooks}
        return found

    def _bank_key(self) -> tuple[Any, ...]:
        place = (self.labels, self.images, id(self.dataloader), self.max_bank, self.encodes)
        return (*place, type(self.task), self.num_classes, *{hook.tokens for hook in self._hooks.values()})
