"""A k-NN classifier beside a run, over the features that it has just seen or over a bank encoded anew."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, check_positive, fail, require
from lightning_contrast.callbacks.capture.dataloaders import check_source, training_loader
from lightning_contrast.callbacks.capture.feature_bank import Bank, Chunks, can_share, encoded
from lightning_contrast.callbacks.capture.labels import Labels
from lightning_contrast.callbacks.probes.base import OnlineProbe, Step
from lightning_contrast.callbacks.probes.metrics import Scores, Share
from lightning_contrast.callbacks.probes.tasks import ClassTask
from lightning_contrast.distributed import world_size
from lightning_contrast.metrics.neighbours import search, vote


class OnlineKNN(OnlineProbe):
    """Classifies validation images by their nearest neighbours among training features, and logs the accuracy.

    The vote is the published one: the ``k`` most similar features, each with the weight exp(cosine / temperature)
    (https://arxiv.org/abs/1805.01978, sec. 3.4; DINO's ``eval_knn.py``). The bank is one of three:

    - "train": the features that the run has seen in training. They belong to augmented images and are up to an epoch
      old, which is not the published protocol; in return it costs no forward pass. Use it to follow a run.
    - "fresh": the set of the run's training loader, encoded anew at each validation in eval mode, the plain images
      where the Trainer has a `ViewAugmentation`: the published protocol, at the price of a forward pass over the set.
    - a loader or a DataModule of labelled batches, encoded in the same way: the run itself may be unlabelled.

    Logged: ``<name>/top1`` at validation (``<name>/test_top1`` at test), also for each of several layers and loaders,
    as `OnlineLinearProbe` does. With several ``k`` or temperatures each pair has its own,
    ``<name>/k<k>_t<temperature>/top1``, and ``<name>/top1`` is that of the first. The run is left as it was, bit for
    bit. Nothing is kept in a checkpoint: a resumed run fills the bank "train" again, so that from the end of its first
    epoch on its values are those of the run that was not stopped; the other banks give them at once.

    Memory for each layer of width F: ``bank_size`` x F x 2 bytes over all ranks, held while training with the bank
    "train" only, and ``bank_size`` x F x 4 bytes (x 6 while it is gathered) on each rank during validation; 128 MiB of
    similarities.

    Args:
        num_classes: Number of classes.
        features: As for `OnlineLinearProbe`.
        labels: As for `OnlineLinearProbe`; images with the label -1 are left out.
        k: Neighbours that vote, one number or several; all, while the bank has fewer.
        temperature: Divisor of the cosine similarities, one or several; unitless, > 0.
        name: First part of the names that are logged; must differ between probes.
        bank_size: Features kept at most, over all ranks. Of "train" the newest; else spread evenly over the set.
        tokens: As for `OnlineLinearProbe`.
        bank: "train", "fresh", or a loader or DataModule of labelled batches.
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
        bank: Any = "train",
    ) -> None:
        super().__init__(ClassTask(num_classes), features=features, labels=labels, name=name, tokens=tokens)
        self.k, self.temperature = _several(k), _several(temperature)
        require(len(self.k) > 0 and len(self.temperature) > 0, "k", "not be empty", k, "Give `k` and `temperature`")
        for one in self.k:
            check_at_least("k", one, 1)
        for heat in self.temperature:
            check_positive("temperature", heat)
        check_at_least("bank_size", bank_size, max(self.k), "Raise `bank_size` to at least `k`")
        if isinstance(bank, str):
            check_choice("bank", bank, ("train", "fresh"))
        else:
            check_source("bank", bank)
        self.bank, self.bank_size = bank, bank_size
        self._chunks = {layer: Chunks() for layer in self.layers}
        self._batches_per_epoch = float("inf")
        self._loader: Any = None
        self._banks: dict[str, Bank | None] = {}

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``, so that a Trainer takes several."""
        return f"OnlineKNN[{self.name}]"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin with an empty bank: features of another fit may be those of another module."""
        super().on_fit_start(trainer, pl_module)
        for chunks in self._chunks.values():
            chunks.clear()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say so, if there will be nothing to judge, and nobody has wished that."""
        if not trainer.enable_validation and trainer.limit_val_batches:
            rank_zero_warn(
                f"`{self.name}` judges validation images, and this run has none, so nothing is logged before a test: "
                "give the module a `validation_step`, and `fit` a validation loader."
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the length of an epoch, beyond which features are too old."""
        self._batches_per_epoch = trainer.num_training_batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the labels and expect their features, where the bank is made of them."""
        if self.bank == "train":
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def learn(self, step: Step) -> None:
        """Keep the features of a batch and forget those of the batch an epoch ago."""
        chunks = self._chunks[step.layer or self.layers[0]]
        chunks.add(step.features, step.labels.masked_fill(~step.valid, -1))
        chunks.forget(max(1, self.bank_size // world_size()), self._batches_per_epoch)

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
        """Give the memory back."""
        self._banks = {}

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the memory back."""
        self._banks = {}

    def predict(self, features: Tensor, layer: str = "") -> Tensor | None:
        """Return the classes (B, S) that win the votes of S pairs of k and temperature, or None without a bank.

        Args:
            features: (B, F).
            layer: Where they come from; "" is the first layer.
        """
        found = self._banks.get(layer or self.layers[0])
        if found is None:
            return None
        bank, labels = found
        widths = (features.shape[1], bank.shape[1])
        hint = "Name a layer that `forward` and the validation step both call"
        require(widths[0] == widths[1], "features", "be as wide at validation as in the bank", widths, hint)
        similarities, indices = search(features, bank, min(max(self.k), len(bank)))
        neighbours = labels[indices]
        shares = [
            vote(similarities[:, :k], neighbours[:, :k], num_classes=self.num_classes, temperature=temperature)
            for k in self.k
            for temperature in self.temperature
        ]
        return torch.stack([share.argmax(dim=1) for share in shares], dim=1)

    def new_scores(self, device: torch.device) -> Scores:
        """Return the accuracy of each vote."""
        pairs = [f"k{k}_t{temperature:g}/top1" for k in self.k for temperature in self.temperature]
        return VoteScores(pairs, device)

    def _gather(self, trainer: Any, pl_module: Any) -> None:
        chunks = self._chunks if self.bank == "train" else self._encode(trainer, pl_module)
        self._banks = {layer: of_layer.gathered(pl_module.device) for layer, of_layer in chunks.items()}
        if self.bank != "train" and chunks and not any(self._banks.values()):
            rank_zero_warn(f"`{self.name}`: no image of the bank has a label and finite features; nothing is logged.")

    def _encode(self, trainer: Any, pl_module: Any) -> dict[str, Chunks]:
        if isinstance(self.bank, str):
            loader = trainer.train_dataloader
            if loader is None:
                rank_zero_warn(f'`{self.name}`: there is no training set to encode for `bank="fresh"` without a fit.')
                return {}
            if not can_share(loader):
                hint = "Give `bank` a loader of labelled images"
                rule = 'be a DataLoader over a set of known length for `bank="fresh"`'
                fail("train_dataloader", rule, type(loader).__name__, hint, TypeError)
        else:
            if self._loader is None:
                self._loader = training_loader("bank", self.bank, trainer)
            loader = self._loader
        self._seen.discard("bank")
        return encoded(trainer, pl_module, list(self._taps.values()), loader, self._read, limit=self.bank_size)

    def _read(self, features: Tensor, batch: Any, layer: int) -> tuple[Tensor, Tensor]:
        """Return the features of a bank's batch and their classes, -1 where a row must not vote."""
        step = self._step(self.layers[layer], features, self._targets_of(batch, "bank"), "bank of features")
        self._seen.add("bank")
        return step.features, step.labels.masked_fill(~step.valid, -1)


class VoteScores(Scores):
    """Accuracies of several votes by name, and that of the first as ``top1``.

    Args:
        names: What is logged of each vote.
        device: Where the predictions are.
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.shares = {name: Share().to(device) for name in names}

    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add predicted classes (B, S) and classes (B,)."""
        for share, predicted in zip(self.shares.values(), outputs.unbind(dim=1), strict=True):
            share.update(predicted == targets, valid)

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies."""
        found = {name: share.compute() for name, share in self.shares.items()}
        first = {"top1": next(iter(found.values()))}
        return first if len(found) == 1 else first | found


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
