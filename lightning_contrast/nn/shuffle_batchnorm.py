"""Shuffled BatchNorm: keys are normalised with other images than their queries."""

import torch
from torch import Tensor

from lightning_contrast import distributed


class Shuffle:
    """A random exchange of the rows of all ranks, and the way back; on one process a permutation of the batch.

    MoCo's shuffling (https://arxiv.org/abs/1911.05722, section 3.3; official program: moco/builder.py). A query and its
    key that share BatchNorm statistics let the network tell positives by them. The permutation is rank 0's.
    Differs from it: ranks may hold different numbers of images.

    Args:
        size: Rows on this rank.
        device: Where they are.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.sizes = distributed.batch_sizes(size, device)
        start, total = sum(self.sizes[: distributed.rank()]), sum(self.sizes)
        self.own = slice(start, start + size)
        order = torch.randperm(total, device=device)
        self.order = distributed.gather(order, [total] * len(self.sizes))[:total]

    def __call__(self, rows: Tensor) -> Tensor:
        """Return as many rows of other ranks and places, ``(B, ...)``, without gradient."""
        return distributed.gather(rows, self.sizes)[self.order[self.own]]

    def undo(self, rows: Tensor) -> Tensor:
        """Return the rows of this rank in their old order, ``(B, ...)``, without gradient."""
        return distributed.gather(rows, self.sizes)[self.order.argsort()[self.own]]
