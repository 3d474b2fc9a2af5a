"""Recall of paired retrieval."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_contrast._checks import check_at_least, check_same_shape, require

CHUNK = 4096


class RetrievalRecall(Metric):
    """Share of queries whose counterpart is among the ``k`` most similar rows of the gallery (recall at k).

    Row i of the gallery is the counterpart of query i, for example another view of the same image, or its text.
    Similarity is the cosine. Ties with the counterpart count as a random draw among them, so features that are all
    equal score k / N, not 1.

    Args:
        k: Number of retrieved rows per query, >= 1.
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = RetrievalRecall(k=1)
        >>> metric.update(torch.eye(3), torch.eye(3)[[0, 2, 1]])
        >>> metric.compute()
        tensor(0.3333)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    queries: list[Tensor]
    gallery: list[Tensor]

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least("k", k, 1)
        self.k = k
        self.add_state("queries", default=[], dist_reduce_fx="cat")
        self.add_state("gallery", default=[], dist_reduce_fx="cat")

    def update(self, queries: Tensor, gallery: Tensor) -> None:
        """Update with pairs.

        Args:
            queries: Features ``(B, F)``, floating; L2-normalized here.
            gallery: Features of their counterparts ``(B, F)``; L2-normalized here.

        Raises:
            ValueError: If the shapes differ or are not 2-D.
        """
        check_same_shape("queries", queries, "gallery", gallery, dims=2)
        self.queries.append(F.normalize(queries.detach().float(), dim=1))
        self.gallery.append(F.normalize(gallery.detach().float(), dim=1))

    def compute(self) -> Tensor:
        """Compute recall at ``k``, a scalar in 0..1.

        Raises:
            ValueError: If there are no pairs.
        """
        require(len(self.queries) > 0, "RetrievalRecall", "have pairs", 0, "Call `update` before `compute`")
        queries, gallery = dim_zero_cat(self.queries), dim_zero_cat(self.gallery)
        found = queries.new_zeros(())
        for start in range(0, len(queries), CHUNK):
            similarity = queries[start : start + CHUNK] @ gallery.T
            own = similarity.diagonal(offset=start).unsqueeze(1)
            better = (similarity > own).sum(dim=1)
            equal = (similarity == own).sum(dim=1)  # including the counterpart itself
            found += ((self.k - better) / equal).clamp(0, 1).sum()
        return found / len(queries)
