"""The contrastive core: differentiable log-sum-exps over similarities that are never formed, across all ranks.

A loss takes its positives by plain autograd, which is cheap, and from here the normaliser of each anchor. The gradient
of a log-sum-exp is a softmax, so that backward needs the log-sum-exp only and makes the tiles a second time.

Across ranks each rank computes the anchors that it holds against the columns of all ranks. For the gradient of its own
rows it needs the log-sum-exp and the incoming gradient of the others' anchors, two numbers a row, and no other
exchange: no gradient of a gathered matrix travels.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch
from lightning_contrast.losses.checks import Scalar
from lightning_contrast.losses.kernels.tiles import (
    Diagonal,
    LogSumExpGradient,
    TileConfig,
    make_plan,
    sweep_gradient,
    sweep_lse,
)


@dataclass(frozen=True)
class NegativeMask:
    """Which columns an anchor meets.

    Args:
        skip_partner: Leave out the anchor's positive.
        groups: Group of each row of this rank, ``(N,)`` integers: columns of the anchor's own group are left out.
        column_groups: Group of each column, where rows and columns are not the same images.
        mask: Columns that count, ``(M,)`` bool, for columns that every rank holds.
        tile_size: Largest edge of a tile; None chooses it.
        views: Rows of an image; the batch of all ranks must have at least 2 images.
    """

    skip_partner: bool = False
    groups: Tensor | None = None
    column_groups: Tensor | None = None
    mask: Tensor | None = None
    tile_size: int | None = None
    views: int = 1


class Shares:
    """The rows of all ranks, gathered without gradient, and where this rank's begin.

    Args:
        x: Rows of this rank, ``(B_r, D)``.
        together: False: this rank is taken for the only one.
    """

    def __init__(self, x: Tensor, together: bool = True) -> None:
        self.together = together and distributed.is_distributed()
        self.sizes = distributed.batch_sizes(len(x), x.device) if self.together else [len(x)]
        self.start = sum(self.sizes[: distributed.rank()]) if self.together else 0
        self.all = self.gather(x)

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks, ``(B, ...)``."""
        return distributed.gather(x, self.sizes) if self.together else x.detach()

    def weights(self, own: LogSumExpGradient) -> LogSumExpGradient:
        """Return the weights of the rows of all ranks."""
        if not self.together:
            return own
        grad, lse = self.gather(torch.stack([own.grad, own.lse], dim=1)).unbind(1)
        return LogSumExpGradient(grad, lse)


def leave_out_plan(x: Tensor, columns: NegativeMask, shares: Shares, views: bool, scale: Scalar = 1.0) -> TileConfig:
    """Return the plan of the rows ``x`` of this rank against the columns of all.

    Args:
        x: Rows, ``(N, D)``.
        columns: What is left out.
        shares: The columns of all ranks.
        views: True: rows and columns are the same, two views of N / 2 images, and no row meets itself.
        scale: Factor of the similarities.
    """
    if shares.together:  # every rank sees the same sizes, so that all of them raise or none does
        check_batch("the embeddings of all ranks", sum(shares.sizes) // columns.views)
    half, start = len(x) // 2, shares.start
    skip: tuple[Diagonal, ...] = ()
    if views:
        skip = (Diagonal(0, start, len(x)),)
        if columns.skip_partner:
            skip += (Diagonal(0, start + half, half), Diagonal(half, start, half))
    elif columns.skip_partner:
        skip = (Diagonal(0, start, len(x)),)
    theirs = columns.groups if columns.column_groups is None else columns.column_groups
    groups = None if columns.groups is None or theirs is None else (columns.groups, shares.gather(theirs))
    bias = None
    if columns.mask is not None:
        bias = torch.zeros_like(columns.mask, dtype=x.dtype).masked_fill(~columns.mask, -torch.inf)
    return make_plan(x, scale, columns.tile_size, skip, groups, bias)


class _SelfLse(torch.autograd.Function):
    """Log-sum-exp of each row's similarities to other rows; the rows are two views of ``N / 2`` images."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Scalar, columns: NegativeMask) -> Tensor:
        shares = Shares(z)
        ctx.shares, ctx.scale = shares, scale
        ctx.plan = leave_out_plan(z, columns, shares, True, scale)
        lse, _ = sweep_lse(z * scale, shares.all, ctx.plan, triangle=not shares.together)
        ctx.save_for_backward(z, lse)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        z, lse = ctx.saved_tensors
        own = LogSumExpGradient(grad, lse)
        everyone = ctx.shares.weights(own)
        alone = not ctx.shares.together
        with torch.autocast(z.device.type, enabled=False):
            gradient, _ = sweep_gradient(
                z, z * ctx.scale, ctx.shares.all, ctx.plan, by_row=own, by_column=everyone, triangle=alone
            )
            # Each similarity was met from both its ends, hence the half.
            grad_scale = 0.5 * (z * gradient).sum() if ctx.needs_input_grad[1] else None
            return gradient * ctx.scale, grad_scale, None


class _PairLse(torch.autograd.Function):
    """Log-sum-exp of each row of ``x`` over rows of ``y``, and of each row of ``y`` over rows of ``x``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Scalar, columns: NegativeMask, both: bool, together: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.scale, ctx.both = scale, both
        ctx.x = ctx.plan_y = None
        ctx.y = Shares(y, together)
        ctx.plan_x = leave_out_plan(x, columns, ctx.y, False, scale)
        lse_x, lse_y = sweep_lse(x * scale, ctx.y.all, ctx.plan_x, of_columns=both and not ctx.y.together)
        if ctx.y.together and (both or ctx.needs_input_grad[1]):
            ctx.x = Shares(x)
            turned = replace(columns, groups=columns.column_groups, column_groups=columns.groups)
            ctx.plan_y = leave_out_plan(y, columns if columns.column_groups is None else turned, ctx.x, False, scale)
        if ctx.y.together:
            lse_y = sweep_lse(y * scale, ctx.x.all, ctx.plan_y)[0] if both else y.new_zeros(len(y))
        ctx.save_for_backward(x, y, lse_x, lse_y)
        if not both:
            ctx.mark_non_differentiable(lse_y)
        return lse_x, lse_y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: Tensor, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, y, lse_x, lse_y = ctx.saved_tensors
        from_x, from_y = LogSumExpGradient(grad_x, lse_x), LogSumExpGradient(grad_y, lse_y) if ctx.both else None
        need_x, need_y, need_scale, *_ = ctx.needs_input_grad
        want_x = need_x or need_scale
        gradient_x, gradient_y = torch.zeros_like(x), torch.zeros_like(y)
        with torch.autocast(x.device.type, enabled=False):
            if not ctx.y.together:
                gradient_x, gradient_y = sweep_gradient(
                    x, x * ctx.scale, y, ctx.plan_x, by_row=from_x, by_column=from_y,
                    need_rows=want_x, need_columns=need_y,
                )  # fmt: skip
            else:
                # All ranks' weights are gathered before either sweep, in one order on every rank.
                all_x = ctx.x.weights(from_x) if need_y else None
                all_y = ctx.y.weights(from_y) if from_y is not None else None
                if want_x:
                    gradient_x, _ = sweep_gradient(
                        x, x * ctx.scale, ctx.y.all, ctx.plan_x, by_row=from_x, by_column=all_y
                    )
                if need_y:
                    gradient_y, _ = sweep_gradient(
                        y, y * ctx.scale, ctx.x.all, ctx.plan_y, by_row=from_y, by_column=all_x
                    )
            grad_scale = (x * gradient_x).sum() if need_scale else None
            return (
                gradient_x * ctx.scale if need_x else None,
                gradient_y * ctx.scale if need_y else None,
                grad_scale, None, None, None,
            )  # fmt: skip


def self_lse(z: Tensor, scale: Scalar, columns: NegativeMask) -> Tensor:
    """Return ``log sum_j exp(scale z_i . z_j)`` over the rows ``j`` of all ranks but ``i`` itself.

    Args:
        z: Unit rows of this rank, ``(2B, D)``, all first views before all second views.
        scale: Factor of the similarities, > 0.
        columns: What else is left out.

    Returns:
        One value for each row of this rank, ``(2B,)``; minus infinity where no column is left.
    """
    return cast("Tensor", _SelfLse.apply(z, scale, columns))


def pair_lse(x: Tensor, y: Tensor, scale: Scalar, columns: NegativeMask) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of ``scale x_i . y_j`` over ``j`` and over ``i``, each over the rows of all ranks.

    Args:
        x: Unit rows of this rank, ``(B, D)``.
        y: Their partners, ``(B, D)``.
        scale: Factor of the similarities, > 0.
        columns: What is left out.

    Returns:
        For each ``x`` of this rank over the ``y``, and for each ``y`` over the ``x``, ``(B,)`` each.
    """
    return cast("tuple[Tensor, Tensor]", _PairLse.apply(x, y, scale, columns, True, True))


def rows_lse(x: Tensor, y: Tensor, scale: Scalar, columns: NegativeMask, *, together: bool = True) -> Tensor:
    """Return ``log sum_j exp(scale x_i . y_j)``.

    Args:
        x: Unit rows of this rank, ``(B, D)``.
        y: Columns, ``(M, D)``.
        scale: Factor of the similarities, > 0.
        columns: What is left out.
        together: True: ``y`` is this rank's share of the columns. False: every rank holds all the columns.

    Returns:
        One value for each row of this rank, ``(B,)``; minus infinity where no column is left.
    """
    return cast("Tensor", _PairLse.apply(x, y, scale, columns, False, together)[0])
