"""Recall and median rank of paired retrieval, one way or both."""

from collections.abc import Sequence
from typing import Any

import torch
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
    equal score k / N, not 1. The rank of a counterpart is 1 for the most similar row; among ties it is their mean rank.

    Args:
        k: Number of retrieved rows per query, >= 1; several for a dict of values.
        both_ways: Also retrieve queries by gallery rows, for a dict of values, as is usual for images and texts.
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = RetrievalRecall(k=1)
        >>> metric.update(torch.eye(3), torch.eye(3)[[0, 2, 1]])
        >>> metric.compute()
        tensor(0.3333)
        >>> metric = RetrievalRecall(k=(1, 2), both_ways=True)
        >>> metric.update(torch.eye(3), torch.eye(3)[[0, 2, 1]])
        >>> [f"{key} {value:.2f}" for key, value in metric.compute().items()][:3]
        ['to_gallery/recall@1 0.33', 'to_gallery/recall@2 0.67', 'to_gallery/median_rank 2.50']
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    queries: list[Tensor]
    gallery: list[Tensor]

    def __init__(self, k: int | Sequence[int] = 1, *, both_ways: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        several = tuple(k) if isinstance(k, list | tuple) else (k,)
        require(len(set(several)) == len(several) > 0, "k", "hold different numbers", k, "Give (1, 5, 10), for example")
        for number in several:
            check_at_least("k", number, 1)
        self.k, self.both_ways = k, both_ways
        self._several: tuple[Any, ...] = several
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

    def compute(self) -> Any:
        """Compute recall at ``k``, a scalar in 0..1; or, for several ``k`` or both ways, a dict of scalars.

        Returns:
            The keys of the dict are ``recall@<k>``, in 0..1, and ``median_rank``, >= 1; with ``both_ways`` each of them
            after ``to_gallery/``, for queries that retrieve gallery rows, and after ``to_queries/``.

        Raises:
            ValueError: If there are no pairs.
        """
        require(len(self.queries) > 0, "RetrievalRecall", "have pairs", 0, "Call `update` before `compute`")
        queries, gallery = dim_zero_cat(self.queries), dim_zero_cat(self.gallery)
        values = self._one_way(queries, gallery)
        if self.both_ways:
            back = self._one_way(gallery, queries)
            forth = {f"to_gallery/{key}": value for key, value in values.items()}
            return forth | {f"to_queries/{key}": value for key, value in back.items()}
        return values if isinstance(self.k, list | tuple) else values[f"recall@{self.k}"]

    def _one_way(self, queries: Tensor, gallery: Tensor) -> dict[str, Tensor]:
        better, equal = _ranks(queries, gallery)
        recalls = {f"recall@{k}": ((k - better) / equal).clamp(0, 1).mean() for k in self._several}
        ranks = (better + (equal + 1) / 2).sort().values
        middle = (ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]) / 2
        return recalls | {"median_rank": middle}


def _ranks(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of rows above each counterpart, and as similar as it with itself, ``(N,)`` each."""
    better, equal = [], []
    for start in range(0, len(queries), CHUNK):
        similarity = queries[start : start + CHUNK] @ gallery.T
        own = similarity.diagonal(offset=start).unsqueeze(1)
        better.append((similarity > own).sum(dim=1))
        equal.append((similarity == own).sum(dim=1))  # including the counterpart itself
    return torch.cat(better), torch.cat(equal)
