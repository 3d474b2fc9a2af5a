"""Accuracy of a weighted k-NN classifier as a metric."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_contrast._checks import check_at_least, check_choice, check_positive, require
from lightning_contrast.metrics.neighbours import (
    check_class_labels,
    check_features,
    knn_scores,
    largest_shares,
    search_euclidean,
    sum_votes,
)


class KNNAccuracy(Metric):
    """Top-k accuracy of the weighted k-NN vote over a bank of labeled features.

    The weight of a neighbor is exp(cosine / temperature) (https://arxiv.org/abs/1805.01978, sec. 3.4). Bank and
    queries can be added in any order, in batches of any size, on any rank: both are gathered, and every rank computes
    the same value. Memory in addition to the stored features is bounded by ``chunk_size``.

    Args:
        num_classes: Number of classes, >= 2.
        k: Number of neighbors that vote, >= 1.
        temperature: Divisor of the cosine similarities; unitless, > 0.
        top_k: A query is correct if its class is among the ``top_k`` with the largest shares of the vote, of equal
            shares the smallest class; 1 to ``num_classes``.
        distance: "cosine", or "euclidean": neighbors by Euclidean distance d, each weighted by 1 / (d + 1e-5), without
            a temperature, as in solo-learn.
        dtype: Dtype of the stored features: ``torch.float32``, or ``torch.float16`` for half the memory.
        chunk_size: Queries per chunk; None chooses it.
        kwargs: Arguments of `torchmetrics.Metric`.

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
        top_k: int = 1,
        distance: str = "cosine",
        dtype: torch.dtype = torch.float32,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least("num_classes", num_classes, 2)
        check_at_least("k", k, 1)
        check_positive("temperature", temperature)
        check_at_least("top_k", top_k, 1)
        require(top_k <= num_classes, "top_k", f"be <= {num_classes}, the number of classes", top_k, "Decrease `top_k`")
        check_choice("distance", distance, ("cosine", "euclidean"))
        check_choice("dtype", dtype, (torch.float32, torch.float16))
        if chunk_size is not None:
            check_at_least("chunk_size", chunk_size, 1)
        self.num_classes, self.k, self.temperature = num_classes, k, temperature
        self.top_k, self.distance = top_k, distance
        self.storage_dtype, self.chunk_size = dtype, chunk_size
        for name in ("bank", "bank_labels", "queries", "query_labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update_bank(self, features: Tensor, labels: Tensor) -> None:
        """Add labeled features to the bank.

        Args:
            features: ``(B, F)``, floating; L2-normalized here for ``distance="cosine"``.
            labels: Classes ``(B,)``, integers in 0..num_classes - 1.

        Raises:
            ValueError: If shapes do not match or a label is out of range.
        """
        check_features("features", features)
        check_class_labels("labels", labels, len(features), self.num_classes)
        self._computed = None  # an earlier result does not include these
        self.bank.append(self._stored(features))
        self.bank_labels.append(labels.detach())

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Update with features to classify.

        Args:
            features: ``(B, F)``, floating; L2-normalized here for ``distance="cosine"``.
            labels: True classes ``(B,)``, integers in 0..num_classes - 1.

        Raises:
            ValueError: If shapes do not match or a label is out of range.
        """
        check_features("features", features)
        check_class_labels("labels", labels, len(features), self.num_classes)
        self.queries.append(self._stored(features))
        self.query_labels.append(labels.detach())

    def compute(self) -> Tensor:
        """Compute the share of queries that are classified correctly, a scalar in 0..1.

        Raises:
            ValueError: If the bank has fewer than ``k`` rows, or there are no queries.
        """
        bank, queries = self.bank, self.queries
        hint = "Call `update_bank` and `update` before `compute`"
        require(len(bank) > 0 and len(queries) > 0, "KNNAccuracy", "have a bank and queries", len(bank), hint)
        labels = dim_zero_cat(self.query_labels)
        scores = self._scores(dim_zero_cat(queries), dim_zero_cat(bank), dim_zero_cat(self.bank_labels))  # (Q, C)
        predictions = largest_shares(scores, self.top_k)  # (Q, top_k)
        return (predictions == labels.unsqueeze(1)).any(dim=1).float().mean()

    def _stored(self, features: Tensor) -> Tensor:
        """Return features (B, F) as they are kept."""
        rows = features.detach().float()
        rows = F.normalize(rows, dim=1) if self.distance == "cosine" else rows
        return rows.to(self.storage_dtype)

    def _scores(self, queries: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
        """Return the votes (Q, C) of the nearest rows of the bank (N, F)."""
        if self.distance == "cosine":
            settings: dict[str, Any] = {"num_classes": self.num_classes, "k": self.k, "temperature": self.temperature}
            return knn_scores(queries, bank, labels, chunk_size=self.chunk_size, **settings)
        widths = (queries.shape[1], bank.shape[1])
        require(widths[0] == widths[1], "queries", "be as wide as the bank", widths, "Use features of the same layer")
        hint = "Decrease `k` or add rows"
        require(self.k <= len(bank), "k", f"be <= {len(bank)}, the number of rows in the bank", self.k, hint)
        weights, indices = search_euclidean(queries, bank, self.k, chunk_size=self.chunk_size)
        return sum_votes(weights, labels.long()[indices], self.num_classes)
