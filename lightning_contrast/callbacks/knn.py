"""A k-NN classifier over the features that a run has just seen."""

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_positive
from lightning_contrast.callbacks._probe_base import Labels, OnlineProbe, Step
from lightning_contrast.distributed import gather, world_size
from lightning_contrast.metrics.neighbours import knn_predict


class OnlineKNN(OnlineProbe):
    """Classifies validation images by their nearest neighbours among the training features, and logs the accuracy.

    The vote is the published one: the ``k`` most similar features, each with the weight exp(cosine / temperature)
    (https://arxiv.org/abs/1805.01978, sec. 3.4; DINO's ``eval_knn.py``). The bank is not the published one: it holds
    the features that the run has seen in training, so they belong to augmented images and are up to an epoch old. In
    return it costs no forward pass. Use it to follow a run, and an evaluation on the frozen backbone to report.

    Logged: ``<name>/top1`` at validation (``<name>/test_top1`` at test), also for each of several loaders, as
    `OnlineLinearProbe` does. The run is left as it was, bit for bit. Nothing is kept in a checkpoint: a resumed run
    fills the bank again, so that from the end of its first epoch on its values are those of the run that was not
    stopped.

    Memory: ``bank_size`` x F x 2 bytes over all ranks while training, and x 4 bytes on each rank during validation.

    Args:
        num_classes: Number of classes.
        features: As for `OnlineLinearProbe`.
        labels: As for `OnlineLinearProbe`; images with the label -1 are left out.
        k: Neighbours that vote; all, while the bank has fewer.
        temperature: Divisor of the cosine similarities; unitless, > 0.
        name: First part of the names that are logged; must differ between probes.
        bank_size: Features kept at most, over all ranks; the newest win.
        tokens: As for `OnlineLinearProbe`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        features: str = "backbone",
        labels: Labels = None,
        k: int = 20,
        temperature: float = 0.07,
        name: str = "knn",
        bank_size: int = 65_536,
        tokens: str = "mean",
    ) -> None:
        super().__init__(num_classes, features=features, labels=labels, name=name, tokens=tokens)
        check_at_least("k", k, 1)
        check_positive("temperature", temperature)
        check_at_least("bank_size", bank_size, k, "Raise `bank_size` to at least `k`")
        self.k, self.temperature, self.bank_size = k, temperature, bank_size
        self._chunks: deque[tuple[Tensor, Tensor]] = deque()
        self._rows = 0
        self._batches_per_epoch = float("inf")
        self._bank: tuple[Tensor, Tensor] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin with an empty bank: features of another fit may be those of another module."""
        super().on_fit_start(trainer, pl_module)
        self._chunks.clear()
        self._rows = 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the length of an epoch, beyond which features are too old."""
        self._batches_per_epoch = trainer.num_training_batches

    def learn(self, step: Step) -> None:
        """Keep the features of a batch and forget those of the batch an epoch ago."""
        labels = step.labels.masked_fill(~step.valid, -1)  # left out at validation: to drop them here costs a sync
        self._chunks.append((F.normalize(step.features, dim=1).half(), labels))
        self._rows += len(labels)
        limit = max(1, self.bank_size // world_size())
        while len(self._chunks) > 1 and (self._rows > limit or len(self._chunks) > self._batches_per_epoch):
            self._rows -= len(self._chunks.popleft()[1])

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Gather the bank of all ranks."""
        super().on_validation_start(trainer, pl_module)
        if not trainer.sanity_checking:
            self._bank = self._gathered(pl_module.device)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Gather the bank of all ranks."""
        super().on_test_start(trainer, pl_module)
        self._bank = self._gathered(pl_module.device)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the memory back."""
        self._bank = None

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the memory back."""
        self._bank = None

    def predict(self, features: Tensor) -> Tensor | None:
        """Return the classes (B,) that win the vote for features (B, F), or None while the bank is empty."""
        if self._bank is None:
            return None
        bank, labels = self._bank
        k = min(self.k, len(bank))
        return knn_predict(features, bank, labels, num_classes=self.num_classes, k=k, temperature=self.temperature)

    def _gathered(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return the labelled features of all ranks, or None where there are none."""
        if self._chunks:
            features = torch.cat([chunk for chunk, _ in self._chunks])
            labels = torch.cat([chunk for _, chunk in self._chunks])
            features, labels = features[labels >= 0], labels[labels >= 0]
        else:
            features, labels = torch.zeros(0, 0, dtype=torch.float16), torch.zeros(0, dtype=torch.int64)
        features, labels = gather(features.to(device)), gather(labels.to(device))
        return (features.float(), labels) if len(labels) else None
