"""Shuffled BatchNorm: keys are normalized with other images than their queries."""

import torch
from torch import Tensor

from lightning_contrast import distributed


class Shuffle:
    """A random permutation of the rows of all ranks, and its inverse.

    MoCo's shuffling (https://arxiv.org/abs/1911.05722, section 3.3; reference implementation: moco/builder.py). If
    a query and its key share BatchNorm statistics, the network can identify positives by them. The permutation is that
    of rank 0.
    Differs from it: ranks may hold different numbers of images.

    Args:
        size: Number of rows of this rank.
        device: Their device.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.sizes = distributed.batch_sizes(size, device)
        start, total = sum(self.sizes[: distributed.rank()]), sum(self.sizes)
        self.own = slice(start, start + size)
        order = torch.randperm(total, device=device)
        self.order = distributed.gather(order, [total] * len(self.sizes))[:total]

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the rows that the permutation assigns to this rank, ``(B, ...)``, without gradient."""
        return distributed.gather(rows, self.sizes)[self.order[self.own]]

    def undo(self, rows: Tensor) -> Tensor:
        """Return the rows of this rank in their original order, ``(B, ...)``, without gradient."""
        return distributed.gather(rows, self.sizes)[self.order.argsort()[self.own]]
