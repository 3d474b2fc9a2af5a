"""Collectives over all ranks by `torch.distributed`; the identity if there is only one process.

Every rank must call each function the same number of times and in the same order. Ranks may hold different numbers of
rows: rows are padded for the transfer and returned in rank order.

The backward pass of the functions ``*_with_gradient`` sums the gradients of all ranks. A loss computed from them has
the same value on every rank, and the mean of its gradients over ranks, which DDP and FSDP compute, equals the gradient
of one process with the joined batch.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_contrast._checks import fail

__all__ = [
    "all_reduce_mean",
    "all_reduce_sum",
    "all_reduce_sum_with_gradient",
    "batch_sizes",
    "check_equal",
    "gather",
    "gather_with_gradient",
    "global_mean",
    "is_distributed",
    "rank",
    "world_size",
]


def is_distributed() -> bool:
    """Return whether there is more than one process."""
    return world_size() > 1


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def batch_sizes(size: int, device: torch.device | None = None) -> list[int]:
    """Return the sizes of all ranks, in rank order.

    Args:
        size: Number of rows on this rank, >= 0.
        device: Device on which the process group communicates; None is the CPU, as for gloo.
    """
    if not is_distributed():
        return [size]
    own = torch.tensor([size], dtype=torch.int64, device=device)
    return [int(n) for n in torch.cat(_all_gather_equal(own)).tolist()]


def check_equal(name: str, value: float, hint: str, device: torch.device | None = None) -> None:
    """Raise on every rank if a number differs between ranks.

    Args:
        name: Name of the number, for the message.
        value: The number on this rank, >= 0.
        hint: How to fix it: a sentence without its full stop.
        device: Device on which the process group communicates; None is the CPU, as for gloo.

    Raises:
        ValueError: If it differs; the message lists the numbers of all ranks.
    """
    if not is_distributed():
        return
    own = torch.tensor([value], dtype=torch.float64, device=device)
    values = torch.cat(_all_gather_equal(own)).tolist()
    if len(set(values)) > 1:
        fail(name, "be the same on all ranks", [int(n) if n < float("inf") else n for n in values], hint)


def gather(x: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Return the rows of all ranks in rank order, without gradient.

    Args:
        x: Any tensor with at least one dimension, ``(B_r, ...)``; ``B_r`` may differ between ranks.
        sizes: Result of `batch_sizes` for these rows; None computes it, with one more collective.

    Returns:
        ``(sum of B_r, ...)``, the same on every rank; ``x`` detached if there is one process.
    """
    x = x.detach()
    if not is_distributed():
        return x
    return _gather_rows(x, batch_sizes(len(x), x.device) if sizes is None else sizes)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order; backward sums the gradient of each rank's rows over ranks.

    Args:
        x: A floating tensor with at least one dimension, ``(B_r, ...)``; ``B_r`` may differ between ranks.

    Returns:
        ``(sum of B_r, ...)``, the same on every rank; ``x`` itself if there is one process.
    """
    if not is_distributed():
        return x
    return cast("Tensor", _Gather.apply(x))


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum over ranks, without gradient; ``x`` is not modified.

    Args:
        x: A tensor of the same shape ``(...)`` on every rank.
    """
    x = x.detach()
    if not is_distributed():
        return x
    total = x.contiguous().clone()
    dist.all_reduce(total)
    return total


def all_reduce_mean(x: Tensor) -> Tensor:
    """Return the unweighted mean over ranks, without gradient.

    Args:
        x: A floating tensor of the same shape ``(...)`` on every rank.
    """
    return all_reduce_sum(x) / world_size() if is_distributed() else x.detach()


def all_reduce_sum_with_gradient(x: Tensor) -> Tensor:
    """Return the sum over ranks; backward sums the gradients over ranks.

    Args:
        x: A floating tensor of the same shape ``(...)`` on every rank.
    """
    return cast("Tensor", _AllReduceSum.apply(x)) if is_distributed() else x


def _all_gather_equal(x: Tensor) -> list[Tensor]:
    """Gather tensors of equal shape."""
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return parts


def _gather_rows(x: Tensor, sizes: list[int]) -> Tensor:
    """Gather ``x`` with ``sizes[r]`` rows on rank r: pad to the longest, gather, cut."""
    is_bool = x.dtype == torch.bool  # not supported by every backend
    x = (x.to(torch.uint8) if is_bool else x).contiguous()
    longest = max(sizes)
    if len(x) < longest:
        x = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    rows = torch.cat([part[:size] for part, size in zip(_all_gather_equal(x), sizes, strict=True)])
    return rows.to(torch.bool) if is_bool else rows


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backward returns the gradient of this rank's rows, summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        sizes = batch_sizes(len(x), x.device)
        ctx.start, ctx.size = sum(sizes[: rank()]), len(x)
        return _gather_rows(x, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)[ctx.start : ctx.start + ctx.size]


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)


def global_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean of ``values`` over all rows of all ranks, the same on every rank.

    The gradient on this rank is ``world_size`` times that of this rank's share, so that the mean over ranks, which DDP
    computes, is the gradient of one process. Ranks may hold different numbers of rows.

    Args:
        values: One value per row of this rank, ``(B_r,)``.
        weights: Weight of each row, ``(B_r,)``, >= 0, for a weighted mean; None weighs all alike.

    Returns:
        The mean, a scalar.
    """
    if weights is not None:
        values = values * weights
    if not is_distributed():
        return values.mean() if weights is None else values.sum() / weights.sum()
    own = values.sum()
    rows = own.new_tensor(float(len(values))) if weights is None else weights.sum()
    total, count = all_reduce_sum(torch.stack([own.detach(), rows])).unbind()
    share = own * world_size() / count
    return share + (total / count - share.detach())
