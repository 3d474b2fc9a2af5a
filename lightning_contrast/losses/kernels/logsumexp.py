"""Differentiable log-sum-exps over similarities that are never materialized, across all ranks.

A loss computes its positives with plain autograd, which is cheap, and the normalizer of each anchor with this module.
The gradient of a log-sum-exp is a softmax, so backward needs only the log-sum-exp and recomputes the tiles.

With several ranks each rank computes its own anchors against the columns of all ranks. For the gradient of its own
rows it needs the log-sum-exp and the incoming gradient of the other ranks' anchors, two numbers per row; the gradient
of a gathered matrix is never communicated.
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
    make_tile_config,
    sweep_gradient,
    sweep_lse,
)
from lightning_contrast.precision import float32_products


@dataclass(frozen=True)
class NegativeMask:
    """Which columns of the similarity matrix are negatives of an anchor.

    Args:
        skip_partner: Mask the anchor's positive.
        groups: Group of each row of this rank, ``(N,)`` integers: columns of the anchor's own group are masked.
        column_groups: Group of each column, ``(M,)``, if rows and columns are not the same images.
        column_mask: Columns that count, ``(M,)`` bool, for columns that every rank holds.
        tile_size: Largest edge of a tile; None chooses it.
        views: Rows per image; the batch of all ranks must have at least 2 images.
    """

    skip_partner: bool = False
    groups: Tensor | None = None
    column_groups: Tensor | None = None
    column_mask: Tensor | None = None
    tile_size: int | None = None
    views: int = 1


class GatheredRows:
    """The rows of all ranks, gathered without gradient, and the position of this rank's rows among them.

    Args:
        x: Rows of this rank, ``(B_r, D)``.
        sharded: True: each rank holds other rows. False: every rank holds the same rows, and nothing is gathered.
    """

    def __init__(self, x: Tensor, sharded: bool = True) -> None:
        self.sharded = sharded and distributed.is_distributed()
        self.sizes = distributed.batch_sizes(len(x), x.device) if self.sharded else [len(x)]
        self.start = sum(self.sizes[: distributed.rank()]) if self.sharded else 0
        self.rows = self.gather(x)

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks, ``(B, ...)``, given this rank's ``(B_r, ...)``."""
        return distributed.gather(x, self.sizes) if self.sharded else x.detach()

    def gather_gradient(self, own: LogSumExpGradient) -> LogSumExpGradient:
        """Return the log-sum-exp gradient of the rows of all ranks."""
        if not self.sharded:
            return own
        grad, lse = self.gather(torch.stack([own.grad, own.lse], dim=1)).unbind(1)
        return LogSumExpGradient(grad, lse)


def masked_tile_config(
    x: Tensor, mask: NegativeMask, columns: GatheredRows, views: bool, scale: Scalar = 1.0
) -> TileConfig:
    """Build the tile config of this rank's rows against the columns of all ranks.

    Args:
        x: Rows, ``(N, D)``.
        mask: Which columns are negatives.
        columns: The columns of all ranks.
        views: True: rows and columns are the same, two views of N / 2 images, and each row's pair with itself is
            masked.
        scale: Factor of the similarities, a number or a scalar tensor.
    """
    if columns.sharded:  # every rank sees the same sizes, so all ranks raise or none
        check_batch("the embeddings of all ranks", sum(columns.sizes) // mask.views)
    half, start = len(x) // 2, columns.start
    skip: tuple[Diagonal, ...] = ()
    if views:
        skip = (Diagonal(0, start, len(x)),)
        if mask.skip_partner:
            skip += (Diagonal(0, start + half, half), Diagonal(half, start, half))
    elif mask.skip_partner:
        skip = (Diagonal(0, start, len(x)),)
    column_groups = mask.groups if mask.column_groups is None else mask.column_groups
    groups = None
    if mask.groups is not None and column_groups is not None:
        groups = (mask.groups, columns.gather(column_groups))
    bias = None
    if mask.column_mask is not None:
        bias = torch.zeros_like(mask.column_mask, dtype=x.dtype).masked_fill(~mask.column_mask, -torch.inf)
    return make_tile_config(x, scale, mask.tile_size, skip, groups, bias)


class _SelfLse(torch.autograd.Function):
    """Log-sum-exp of each row's similarities to other rows; the rows are two views of ``N / 2`` images."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Scalar, mask: NegativeMask) -> Tensor:
        """Compute the log-sum-exps ``(N,)`` of ``z`` ``(N, D)``."""
        ctx.columns = GatheredRows(z)
        ctx.config = masked_tile_config(z, mask, ctx.columns, True, scale)
        ctx.scale = scale
        scaled = z * scale
        lse, _ = sweep_lse(scaled, ctx.columns.rows, ctx.config, triangle=not ctx.columns.sharded)
        ctx.save_for_backward(z, scaled, lse)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Compute the gradients of ``z``, ``(N, D)``, and of a learned scale, a scalar."""
        z, scaled, lse = ctx.saved_tensors
        own = LogSumExpGradient(grad, lse)
        gathered = ctx.columns.gather_gradient(own)
        triangle = not ctx.columns.sharded
        with float32_products(z.device.type):
            gradient, _ = sweep_gradient(
                z, scaled, ctx.columns.rows, ctx.config, by_row=own, by_column=gathered, triangle=triangle
            )
            # Each similarity counts twice, from either of its rows.
            grad_scale = 0.5 * (z * gradient).sum() if ctx.needs_input_grad[1] else None
            return gradient.mul_(ctx.scale), grad_scale, None


class _PairLse(torch.autograd.Function):
    """Log-sum-exp of each row of ``x`` over rows of ``y``, and of each row of ``y`` over rows of ``x``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Scalar, mask: NegativeMask, both: bool, sharded: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute the log-sum-exps ``(B,)`` of ``x`` ``(B, D)`` and ``(M,)`` of ``y`` ``(M, D)``."""
        ctx.scale, ctx.both = scale, both
        ctx.x = ctx.config_y = None
        ctx.y = GatheredRows(y, sharded)
        ctx.config_x = masked_tile_config(x, mask, ctx.y, False, scale)
        lse_x, lse_y = sweep_lse(x * scale, ctx.y.rows, ctx.config_x, of_columns=both and not ctx.y.sharded)
        if ctx.y.sharded and (both or ctx.needs_input_grad[1]):
            ctx.x = GatheredRows(x)
            turned = replace(mask, groups=mask.column_groups, column_groups=mask.groups)
            ctx.config_y = masked_tile_config(y, mask if mask.column_groups is None else turned, ctx.x, False, scale)
        if ctx.y.sharded and both:
            lse_y, _ = sweep_lse(y * scale, ctx.x.rows, ctx.config_y)
        lse_y = y.new_zeros(len(y)) if lse_y is None else lse_y
        ctx.save_for_backward(x, y, lse_x, lse_y)
        if not both:
            ctx.mark_non_differentiable(lse_y)
        return lse_x, lse_y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: Tensor, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Compute the gradients of ``x`` ``(B, D)``, of ``y`` ``(M, D)`` and of a learned scale, a scalar."""
        x, y, lse_x, lse_y = ctx.saved_tensors
        from_x, from_y = LogSumExpGradient(grad_x, lse_x), LogSumExpGradient(grad_y, lse_y) if ctx.both else None
        need_x, need_y, need_scale, *_ = ctx.needs_input_grad
        want_x = need_x or need_scale
        with float32_products(x.device.type):
            if not ctx.y.sharded:
                gradient_x, gradient_y = sweep_gradient(
                    x, x * ctx.scale, y, ctx.config_x, by_row=from_x, by_column=from_y,
                    need_rows=want_x, need_columns=need_y,
                )  # fmt: skip
            else:
                gradient_x, gradient_y = torch.zeros_like(x), torch.zeros_like(y)
                # The gradients of all ranks are gathered before either sweep, in the same order on every rank.
                all_x = ctx.x.gather_gradient(from_x) if need_y else None
                all_y = ctx.y.gather_gradient(from_y) if from_y is not None else None
                if want_x:
                    gradient_x, _ = sweep_gradient(
                        x, x * ctx.scale, ctx.y.rows, ctx.config_x, by_row=from_x, by_column=all_y
                    )
                if need_y:
                    gradient_y, _ = sweep_gradient(
                        y, y * ctx.scale, ctx.x.rows, ctx.config_y, by_row=from_y, by_column=all_x
                    )
            grad_scale = (x * gradient_x).sum() if need_scale else None
            return (
                gradient_x * ctx.scale if need_x else None,
                gradient_y * ctx.scale if need_y else None,
                grad_scale, None, None, None,
            )  # fmt: skip


def self_lse(z: Tensor, scale: Scalar, mask: NegativeMask) -> Tensor:
    """Compute ``log sum_j exp(scale z_i . z_j)`` over the rows ``j`` of all ranks except ``i`` itself.

    Args:
        z: Unit rows of this rank, ``(2B, D)``, all first views before all second views.
        scale: Factor of the similarities, > 0.
        mask: Which further pairs are masked.

    Returns:
        One value per row of this rank, ``(2B,)``; minus infinity where all columns are masked.
    """
    return cast("Tensor", _SelfLse.apply(z, scale, mask))


def pair_lse(x: Tensor, y: Tensor, scale: Scalar, mask: NegativeMask) -> tuple[Tensor, Tensor]:
    """Compute the log-sum-exps of ``scale x_i . y_j`` over ``j`` and over ``i``, each over the rows of all ranks.

    Args:
        x: Unit rows of this rank, ``(B, D)``.
        y: Their partners, ``(B, D)``.
        scale: Factor of the similarities, > 0.
        mask: Which pairs are masked.

    Returns:
        For each ``x`` of this rank over the ``y``, and for each ``y`` over the ``x``, ``(B,)`` each.
    """
    return cast("tuple[Tensor, Tensor]", _PairLse.apply(x, y, scale, mask, True, True))


def rows_lse(x: Tensor, y: Tensor, scale: Scalar, mask: NegativeMask, *, sharded: bool = True) -> Tensor:
    """Compute ``log sum_j exp(scale x_i . y_j)``.

    Args:
        x: Unit rows of this rank, ``(B, D)``.
        y: Columns, ``(M, D)``.
        scale: Factor of the similarities, > 0.
        mask: Which pairs are masked.
        sharded: True: ``y`` is this rank's share of the columns. False: every rank holds all columns.

    Returns:
        One value per row of this rank, ``(B,)``; minus infinity where all columns are masked.
    """
    return cast("Tensor", _PairLse.apply(x, y, scale, mask, False, sharded)[0])


def shards_lse(x: Tensor, y: Tensor, scale: Scalar, mask: NegativeMask) -> Tensor:
    """Compute ``log sum_j exp(scale x_i . y_j)`` over the columns of all ranks, none of which leaves its rank.

    Each rank sums over its columns for the rows of all ranks; one number per row and rank is communicated, and in
    backward the gradient of the rows.

    Args:
        x: Unit rows of this rank, ``(B, D)``.
        y: The columns of this rank, ``(M, D)``, without gradient; those of a sharded queue.
        scale: Factor of the similarities, > 0.
        mask: Which pairs are masked; ``column_mask`` and ``column_groups`` are those of the columns of this rank.

    Returns:
        One value per row of this rank, ``(B,)``; minus infinity where all columns are masked.
    """
    if not distributed.is_distributed():
        return rows_lse(x, y, scale, mask, sharded=False)
    sizes = distributed.batch_sizes(len(x), x.device)
    start = sum(sizes[: distributed.rank()])
    groups = None if mask.groups is None else distributed.gather(mask.groups, sizes)
    rows = distributed.gather_with_gradient(x)  # (B of all ranks, D)
    part = rows_lse(rows, y, scale, replace(mask, groups=groups), sharded=False)
    peak = distributed.gather(part[None], [1] * len(sizes)).amax(0)
    peak = peak.masked_fill(peak.isneginf(), 0.0)
    total = distributed.all_reduce_sum_with_gradient((part - peak).exp())[start : start + len(x)]
    empty = total == 0
    lse = total.masked_fill(empty, 1.0).log() + peak[start : start + len(x)]
    return lse.masked_fill(empty, -torch.inf)
