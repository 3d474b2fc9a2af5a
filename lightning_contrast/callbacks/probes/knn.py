"""Online k-NN classifier over the features of the training steps, or over a set that is encoded at validation."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, check_positive, fail, require
from lightning_contrast.callbacks.capture.dataloaders import check_source, training_loader
from lightning_contrast.callbacks.capture.feature_bank import FeatureBuffer, LabeledFeatures, can_share, encoded
from lightning_contrast.callbacks.capture.labels import Labels
from lightning_contrast.callbacks.probes.base import BatchSource, OnlineProbe, Step
from lightning_contrast.callbacks.probes.metrics import MaskedAccuracy, Scores
from lightning_contrast.callbacks.probes.tasks import ClassTask
from lightning_contrast.distributed import world_size
from lightning_contrast.metrics.neighbours import search, vote


class OnlineKNN(OnlineProbe):
    """Classify validation images by their nearest neighbors among training features, and log the accuracy.

    The vote is the published one: the ``k`` most similar features, each weighted by exp(cosine / temperature)
    (https://arxiv.org/abs/1805.01978, sec. 3.4; DINO's ``eval_knn.py``). The bank of features is one of three:

    - ``bank="train"``: the features of the training steps. They belong to augmented images and are up to an epoch old,
      so this is not the published protocol, but it needs no forward pass. Use it to follow a run.
    - ``bank="fresh"``: the set of the run's training loader, encoded at each validation in eval mode, on unaugmented
      images if the Trainer has a `ViewAugmentation`. This is the published protocol; it costs a forward pass per image.
    - ``dataloader=loader``: labeled batches of another loader, encoded in the same way; the run itself may be
      unlabeled.

    Logged: ``<name>/top1`` at validation (``<name>/test_top1`` at test), also per layer and per loader as by
    `OnlineLinearProbe`. Several ``k`` or temperatures are logged as ``<name>/k<k>_t<temperature>/top1`` each, and the
    first also as ``<name>/top1``. The run is not changed, bit for bit. A checkpoint keeps nothing: after a resume the
    bank "train" fills again, so its values equal those of the uninterrupted run from the end of the first epoch on; the
    other banks are complete at once.

    Memory per layer of width F: ``bank_size`` x F x 2 bytes over all ranks, during training, for the bank "train" only;
    and ``bank_size`` x F x 4 bytes (x 6 while gathering) on each rank plus 128 MiB of similarities during validation.

    Args:
        num_classes: Number of classes, >= 2.
        features: As in `OnlineLinearProbe`.
        labels: As in `OnlineLinearProbe`; images with the label -1 are left out.
        k: One or several numbers of neighbors that vote, >= 1; all features while the bank has fewer.
        temperature: One or several divisors of the cosine similarities; unitless, > 0.
        name: Prefix of the log keys; must differ between probes.
        bank_size: Maximum number of features over all ranks, >= k. "train" keeps the newest; a set that is encoded is
            sampled evenly.
        tokens: As in `OnlineLinearProbe`.
        bank: "train" or "fresh".
        dataloader: A loader of labeled batches, or a LightningDataModule whose training loader is used, as the bank.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or ``dataloader`` is given with ``bank="fresh"``.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        features: str | Sequence[str] = "backbone",
        labels: Labels = None,
        k: int | Sequence[int] = 20,
        temperature: float | Sequence[float] = 0.07,
        name: str = "knn",
        bank_size: int = 65_536,
        tokens: str = "mean",
        bank: str = "train",
        dataloader: Any = None,
    ) -> None:
        super().__init__(ClassTask(num_classes), features=features, labels=labels, name=name, tokens=tokens)
        self.k, self.temperature = _several(k), _several(temperature)
        require(len(self.k) > 0 and len(self.temperature) > 0, "k", "not be empty", k, "Give `k` and `temperature`")
        for neighbors in self.k:
            check_at_least("k", neighbors, 1)
        for value in self.temperature:
            check_positive("temperature", value)
        check_at_least("bank_size", bank_size, max(self.k), "Raise `bank_size` to at least `k`")
        if not isinstance(bank, str):
            fail("bank", 'be "train" or "fresh"', type(bank).__name__, "Give a loader as `dataloader`", TypeError)
        check_choice("bank", bank, ("train", "fresh"))
        if dataloader is not None:
            check_source("dataloader", dataloader)
            hint = "Give either `bank` or `dataloader`"
            require(bank == "train", "bank", "be left out if there is a `dataloader`", bank, hint)
        self.bank, self.bank_size, self.dataloader = bank, bank_size, dataloader
        self._collects = dataloader is None and bank == "train"
        self._buffers = {layer: FeatureBuffer() for layer in self.layers}
        self._batches_per_epoch = float("inf")
        self._loader: Any = None
        self._banks: dict[str, LabeledFeatures | None] = {}

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``, which allows several in a Trainer."""
        return f"OnlineKNN[{self.name}]"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Empty the bank: features of an earlier fit may belong to another module."""
        super().on_fit_start(trainer, pl_module)
        for buffer in self._buffers.values():
            buffer.clear()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn if the run has no validation data, unless validation was turned off."""
        if not trainer.enable_validation and trainer.limit_val_batches:
            rank_zero_warn(
                f"`{self.name}` classifies validation images, and this run has none, so nothing is logged before a "
                "test: define a `validation_step`, and give `fit` a validation loader."
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Read the length of an epoch; older features leave the bank."""
        self._batches_per_epoch = trainer.num_training_batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the labels and arm the hooks, for the bank "train" only."""
        if self._collects:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def learn(self, step: Step) -> None:
        """Add the features of a batch and remove those of one epoch before."""
        buffer = self._buffers[step.layer or self.layers[0]]
        buffer.add(step.features, self.task.masked(step.labels, step.valid))
        buffer.trim(max(1, self.bank_size // world_size()), self._batches_per_epoch)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Gather the bank of all ranks."""
        super().on_validation_start(trainer, pl_module)
        if not trainer.sanity_checking:
            self._gather(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Gather the bank of all ranks."""
        super().on_test_start(trainer, pl_module)
        self._gather(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Free the gathered bank."""
        self._banks = {}

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Free the gathered bank."""
        self._banks = {}

    def predict(self, features: Tensor, layer: str = "") -> Tensor | None:
        """Return the classes ``(B, S)`` that win the votes of S pairs of k and temperature, or None without a bank.

        Args:
            features: ``(B, F)``.
            layer: Layer of the features; "" is the first layer.

        Raises:
            ValueError: If the features of the bank have another width.
        """
        found = self._banks.get(layer or self.layers[0])
        if found is None:
            return None
        bank, labels = found
        widths = (features.shape[1], bank.shape[1])
        hint = "Name a layer that `forward` and the validation step both call"
        require(widths[0] == widths[1], "features", "be as wide at validation as in the bank", widths, hint)
        similarities, indices = search(features, bank, min(max(self.k), len(bank)))
        neighbors = labels[indices]
        shares = [
            vote(similarities[:, :k], neighbors[:, :k], num_classes=self.num_classes, temperature=temperature)
            for k in self.k
            for temperature in self.temperature
        ]
        return torch.stack([share.argmax(dim=1) for share in shares], dim=1)

    def new_scores(self, device: torch.device) -> Scores:
        """Return the accuracy of each vote."""
        pairs = [f"k{k}_t{temperature:g}/top1" for k in self.k for temperature in self.temperature]
        return VoteScores(pairs, device)

    def _gather(self, trainer: Any, pl_module: Any) -> None:
        buffers = self._buffers if self._collects else self._encode(trainer, pl_module)
        self._banks = {layer: buffer.gathered(pl_module.device) for layer, buffer in buffers.items()}
        if not self._collects and buffers and not any(self._banks.values()):
            rank_zero_warn(f"`{self.name}`: no image of the bank has a label and finite features; nothing is logged.")

    def _encode(self, trainer: Any, pl_module: Any) -> dict[str, FeatureBuffer]:
        if self.dataloader is None:
            loader = trainer.train_dataloader
            if loader is None:
                rank_zero_warn(f'`{self.name}`: there is no training set to encode for `bank="fresh"` without a fit.')
                return {}
            if not can_share(loader):
                hint = "Give a loader of labeled images as `dataloader`"
                rule = 'be a DataLoader over a set of known length for `bank="fresh"`'
                fail("train_dataloader", rule, type(loader).__name__, hint, TypeError)
        else:
            if self._loader is None:
                self._loader = training_loader("dataloader", self.dataloader, trainer)
            loader = self._loader
        self._checked.discard(BatchSource.BANK)
        return encoded(trainer, pl_module, list(self._hooks.values()), loader, self._read, limit=self.bank_size)

    def _read(self, features: Tensor, batch: Any, layer: int) -> tuple[Tensor, Tensor]:
        """Return features and classes of a bank's batch, with class -1 for rows that do not vote."""
        targets = self._targets_of(batch, BatchSource.BANK)
        step = self._step(self.layers[layer], features, targets, BatchSource.BANK)
        self._checked.add(BatchSource.BANK)
        return step.features, self.task.masked(step.labels, step.valid)


class VoteScores(Scores):
    """Accuracies of several votes by name, and that of the first as ``top1``.

    Args:
        names: Log key of each vote.
        device: Device of the predictions.
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.accuracies = {name: MaskedAccuracy().to(device) for name in names}

    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add predicted classes ``(B, S)``, classes ``(B,)`` and the mask ``(B,)``."""
        for accuracy, predicted in zip(self.accuracies.values(), outputs.unbind(dim=1), strict=True):
            accuracy.update(predicted == targets, valid)

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies, scalars."""
        found = {name: accuracy.compute() for name, accuracy in self.accuracies.items()}
        first = {"top1": next(iter(found.values()))}
        return first if len(found) == 1 else first | found


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
