"""Accuracy of a weighted k-NN classifier as a metric."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_contrast._checks import check_at_least, check_choice, check_positive, require
from lightning_contrast.metrics.neighbours import check_class_labels, check_features, knn_predict


class KNNAccuracy(Metric):
    """Top-1 accuracy of the weighted k-NN vote over a bank of labelled features.

    A neighbour's weight is exp(cosine / temperature) (https://arxiv.org/abs/1805.01978, sec. 3.4). The bank and the
    queries may be given in any order, in batches of any size, shared among ranks in any way: both are gathered, and
    every rank computes the same value. Memory beside the stored features is bounded by ``chunk_size``.

    Args:
        num_classes: Number of classes.
        k: Neighbours that vote.
        temperature: Divisor of the cosine similarities; unitless, > 0.
        dtype: What features are stored in: ``torch.float32``, or ``torch.float16`` for half the memory.
        chunk_size: Queries compared at a time; None chooses it.
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = KNNAccuracy(num_classes=2, k=1)
        >>> metric.update_bank(torch.eye(2), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    bank: list[Tensor]
    bank_labels: list[Tensor]
    queries: list[Tensor]
    query_labels: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        k: int = 20,
        temperature: float = 0.07,
        *,
        dtype: torch.dtype = torch.float32,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least("num_classes", num_classes, 2)
        check_at_least("k", k, 1)
        check_positive("temperature", temperature)
        check_choice("dtype", dtype, (torch.float32, torch.float16))
        if chunk_size is not None:
            check_at_least("chunk_size", chunk_size, 1)
        self.num_classes, self.k, self.temperature = num_classes, k, temperature
        self.storage_dtype, self.chunk_size = dtype, chunk_size
        for name in ("bank", "bank_labels", "queries", "query_labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update_bank(self, features: Tensor, labels: Tensor) -> None:
        """Add labelled features that vote.

        Args:
            features: ``(B, F)``, floating; L2-normalised here.
            labels: Classes ``(B,)``, integer.

        Raises:
            ValueError: If shapes do not fit or a label is out of range.
        """
        check_features("features", features)
        check_class_labels("labels", labels, len(features), self.num_classes)
        self._computed = None  # a value that was computed before does not know of these
        self.bank.append(F.normalize(features.detach().float(), dim=1).to(self.storage_dtype))
        self.bank_labels.append(labels.detach())

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add features to classify.

        Args:
            features: ``(B, F)``, floating; L2-normalised here.
            labels: True classes ``(B,)``, integer.

        Raises:
            ValueError: If shapes do not fit or a label is out of range.
        """
        check_features("features", features)
        check_class_labels("labels", labels, len(features), self.num_classes)
        self.queries.append(F.normalize(features.detach().float(), dim=1).to(self.storage_dtype))
        self.query_labels.append(labels.detach())

    def compute(self) -> Tensor:
        """Return the share of the queries whose class won the vote, a scalar in 0..1.

        Raises:
            ValueError: If the bank has fewer than ``k`` rows, or there are no queries.
        """
        bank, queries = self.bank, self.queries
        hint = "Call `update_bank` and `update` before `compute`"
        require(len(bank) > 0 and len(queries) > 0, "KNNAccuracy", "have a bank and queries", len(bank), hint)
        labels = dim_zero_cat(self.query_labels)
        predictions = knn_predict(
            dim_zero_cat(queries),
            dim_zero_cat(bank),
            dim_zero_cat(self.bank_labels),
            num_classes=self.num_classes,
            k=self.k,
            temperature=self.temperature,
            chunk_size=self.chunk_size,
        )
        return (predictions == labels).float().mean()
