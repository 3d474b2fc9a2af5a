"""Any differentiable function of each anchor's row of similarities, with a few rows at a time in memory."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_contrast import distributed
from lightning_contrast.losses.kernels.logsumexp import GatheredRows, NegativeMask, masked_tile_config
from lightning_contrast.losses.kernels.tiles import TileConfig, mask_logits, split
from lightning_contrast.precision import float32_products

ELEMENTS = 2**22  # similarities in memory at a time

# Takes similarities (R, M), a bias of the logits (R, M; minus infinity masks) and parameters; returns (R,).
RowFunction = Callable[..., Tensor]


class _PerRow(torch.autograd.Function):
    """``function`` of the similarities of each row of ``x`` to ``y``; backward calls it again, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        function: RowFunction,
        x: Tensor,
        y: Tensor,
        mask: NegativeMask,
        views: bool,
        sharded: bool,
        *parameters: Tensor,
    ) -> Tensor:
        """Compute the function of each row, ``(N,)``."""
        ctx.function, ctx.columns = function, GatheredRows(y, sharded)
        ctx.config = masked_tile_config(x, mask, ctx.columns, views)
        ctx.save_for_backward(x, *parameters)
        columns = ctx.columns.rows
        parts = []
        for i in split(len(x), _rows_at_once(ctx.config, len(columns))):
            similarities = x[i] @ columns.T
            bias = mask_logits(torch.zeros_like(similarities), i, slice(0, len(columns)), ctx.config)
            parts.append(function(similarities, bias, *parameters))
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of ``x`` ``(N, D)``, of ``y`` ``(M_r, D)`` and of the parameters."""
        x, *parameters = ctx.saved_tensors
        columns = ctx.columns.rows
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(columns)
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        grad_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        with float32_products(x.device.type):
            for i in split(len(x), _rows_at_once(ctx.config, len(columns))):
                similarities = x[i] @ columns.T
                bias = mask_logits(torch.zeros_like(similarities), i, slice(0, len(columns)), ctx.config)
                with torch.enable_grad():
                    values = ctx.function(similarities.requires_grad_(), bias, *leaves)
                found, *rest = torch.autograd.grad(values, [similarities, *leaves], grad[i])
                grad_x[i] = found @ columns
                grad_y.addmm_(found.T, x[i])
                for total, part in zip(grad_parameters, rest, strict=True):
                    total.add_(part)
        if ctx.columns.sharded:
            own = slice(ctx.columns.start, ctx.columns.start + ctx.columns.sizes[distributed.rank()])
            grad_y = distributed.all_reduce_sum(grad_y)[own]
        return None, grad_x, grad_y, None, None, None, *grad_parameters


def _rows_at_once(config: TileConfig, columns: int) -> int:
    return max(1, min(config.tile, ELEMENTS // max(1, columns)))


def per_row(
    function: RowFunction,
    x: Tensor,
    y: Tensor,
    mask: NegativeMask,
    *parameters: Tensor,
    views: bool = False,
    sharded: bool = True,
) -> Tensor:
    """Compute ``function(similarities, bias, *parameters)`` of each row of ``x``.

    Args:
        function: Takes similarities ``(R, M)``, a bias of the logits ``(R, M)`` (minus infinity for masked pairs) and
            the parameters, and returns ``(R,)``; each value depends on its own row only.
        x: Unit rows of this rank, ``(N, D)``.
        y: Columns, ``(M_r, D)``.
        mask: Which pairs are masked.
        *parameters: Learned tensors that the function uses.
        views: True: ``y`` is ``x``, two views of N / 2 images, and each row's pair with itself is masked.
        sharded: True: ``y`` is this rank's share of the columns. False: every rank holds all columns.

    Returns:
        ``(N,)``.
    """
    return cast("Tensor", _PerRow.apply(function, x, y, mask, views, sharded, *parameters))
