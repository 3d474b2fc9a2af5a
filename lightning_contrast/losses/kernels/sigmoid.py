"""Sums of ``softplus`` over the logits of all pairs that do not match, in tiles, with the columns in a ring of ranks.

A sigmoid loss needs no normalizer, so the gradient of each tile is final: a rank holds at most one other rank's
columns at a time. In backward the gradient of these columns travels with them and is complete after a full turn.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch
from lightning_contrast.losses.checks import Scalar
from lightning_contrast.losses.kernels.tiles import Diagonal, Tiles, make_tile_config
from lightning_contrast.precision import float32_products


def _pass_on(x: Tensor, rows: int) -> Tensor:
    """Send ``x`` to the next rank and receive ``rows`` rows from the previous one."""
    world, rank = distributed.world_size(), distributed.rank()
    received = x.new_empty(rows, *x.shape[1:])
    jobs = [
        dist.P2POp(dist.isend, x.contiguous(), (rank + 1) % world),
        dist.P2POp(dist.irecv, received, (rank - 1) % world),
    ]
    for request in dist.batch_isend_irecv(jobs):
        request.wait()
    return received


def _owner_after(hops: int) -> int:
    """Return the rank whose columns this rank holds after ``hops`` exchanges."""
    return (distributed.rank() - hops) % distributed.world_size()


class _SoftplusSums(torch.autograd.Function):
    """Sum of ``softplus(scale x.y + bias)`` of each row over the columns of all ranks except its partner."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Scalar, bias: Scalar, tile_size: int | None, groups: Tensor | None
    ) -> Tensor:
        """Compute the sums ``(B,)`` of ``x`` ``(B, D)``."""
        ctx.sizes = distributed.batch_sizes(len(y), y.device)
        if len(ctx.sizes) > 1:  # every rank sees the same sizes, so all ranks raise or none
            check_batch("the embeddings of all ranks", sum(ctx.sizes))
        ctx.scale, ctx.bias, ctx.tile_size = scale, bias, tile_size
        ctx.groups = None  # of each rank
        if groups is not None:
            ctx.groups = torch.split(distributed.gather(groups, ctx.sizes), ctx.sizes)
        total, share = x.new_zeros(len(x)), y.detach()
        for hops in range(len(ctx.sizes)):
            if hops:
                share = _pass_on(share, ctx.sizes[_owner_after(hops)])
            for i, _, logits in _tiles(x, share, ctx, hops):
                total[i] -= F.logsigmoid(logits.neg_()).sum(1)
        ctx.save_for_backward(x, y)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None, None]:
        """Compute the gradients of ``x`` and ``y``, ``(B, D)``, and of learned scale and bias, scalars."""
        x, y = ctx.saved_tensors
        grad_x, grad_bias = torch.zeros_like(x), x.new_zeros(())
        weighted = x * grad.unsqueeze(1)  # (B, D)
        share = torch.cat([y, torch.zeros_like(y)], dim=1)  # columns and their gradient travel together
        with float32_products(x.device.type):
            for hops in range(len(ctx.sizes)):
                if hops:
                    share = _pass_on(share, ctx.sizes[_owner_after(hops)])
                columns, grad_columns = share.chunk(2, dim=1)
                columns = columns.contiguous()
                for i, j, logits in _tiles(x, columns, ctx, hops):
                    chance = logits.sigmoid_()
                    grad_x[i].addmm_(chance, columns[j])
                    grad_columns[j].addmm_(chance.T, weighted[i])
                    if ctx.needs_input_grad[3]:
                        grad_bias += grad[i] @ chance.sum(1)
            if len(ctx.sizes) > 1:
                share = _pass_on(share, len(y))
            grad_x *= grad.unsqueeze(1)
            grad_y = share.chunk(2, dim=1)[1]
            grad_scale = (x * grad_x).sum() if ctx.needs_input_grad[2] else None
            return (
                grad_x * ctx.scale,
                grad_y * ctx.scale,
                grad_scale,
                grad_bias if ctx.needs_input_grad[3] else None,
                None,
                None,
            )


def _tiles(x: Tensor, columns: Tensor, ctx: Any, hops: int) -> Tiles:
    """Return the tiles against one rank's columns; the partners of this rank's rows are masked."""
    skip = () if hops else (Diagonal(0, 0, len(x)),)
    offset = torch.zeros_like(columns[:, 0]) + ctx.bias
    groups = None if ctx.groups is None else (ctx.groups[distributed.rank()], ctx.groups[_owner_after(hops)])
    config = make_tile_config(x, ctx.scale, ctx.tile_size, skip, groups, offset)
    return Tiles(x * ctx.scale, columns, config)


def softplus_sums(
    x: Tensor, y: Tensor, scale: Scalar, bias: Scalar, tile_size: int | None = None, groups: Tensor | None = None
) -> Tensor:
    """Compute ``sum_j softplus(scale x_i . y_j + bias)`` over the ``j`` of all ranks except the partner of ``i``.

    Args:
        x: Unit rows of this rank, ``(B, D)``.
        y: Their partners, ``(B, D)``.
        scale: Factor of the similarities, > 0.
        bias: Added to every logit.
        tile_size: Largest edge of a tile; None chooses it.
        groups: Group of each pair of this rank, ``(B,)`` integers: pairs of the row's own group are left out.

    Returns:
        One value per row of this rank, ``(B,)``.
    """
    return cast("Tensor", _SoftplusSums.apply(x, y, scale, bias, tile_size, groups))
