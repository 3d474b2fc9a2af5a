"""Any function of each anchor's row of similarities, differentiable, with a few rows at a time in memory."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_contrast import distributed
from lightning_contrast.losses.kernels.logsumexp import NegativeMask, Shares, leave_out_plan
from lightning_contrast.losses.kernels.tiles import TileConfig, leave_out, split

ELEMENTS = 2**22  # similarities in memory at a time

# Gets similarities (R, M), what to add to the logits (R, M; minus infinity leaves out), and parameters; returns (R,).
RowFunction = Callable[..., Tensor]


class _PerRow(torch.autograd.Function):
    """``function`` of the similarities of each row of ``x`` to ``y``; backward calls it again row by row."""

    @staticmethod
    def forward(
        ctx: Any,
        function: RowFunction,
        x: Tensor,
        y: Tensor,
        columns: NegativeMask,
        views: bool,
        together: bool,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.function, ctx.y = function, Shares(y, together)
        ctx.plan = leave_out_plan(x, columns, ctx.y, views)
        ctx.save_for_backward(x, *parameters)
        everything = slice(0, len(ctx.y.all))
        parts = []
        for i in split(len(x), _rows_at_once(ctx.plan, everything.stop)):
            similarities = x[i] @ ctx.y.all.T
            bias = leave_out(torch.zeros_like(similarities), i, everything, ctx.plan)
            parts.append(function(similarities, bias, *parameters))
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        columns = ctx.y.all
        everything = slice(0, len(columns))
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(columns)
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        grad_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        with torch.autocast(x.device.type, enabled=False):
            for i in split(len(x), _rows_at_once(ctx.plan, len(columns))):
                similarities = x[i] @ columns.T
                bias = leave_out(torch.zeros_like(similarities), i, everything, ctx.plan)
                with torch.enable_grad():
                    values = ctx.function(similarities.requires_grad_(), bias, *leaves)
                found, *rest = torch.autograd.grad(values, [similarities, *leaves], grad[i])
                grad_x[i] = found @ columns
                grad_y.addmm_(found.T, x[i])
                for total, part in zip(grad_parameters, rest, strict=True):
                    total.add_(part)
        if ctx.y.together:
            own = slice(ctx.y.start, ctx.y.start + ctx.y.sizes[distributed.rank()])
            grad_y = distributed.all_reduce_sum(grad_y)[own]
        return None, grad_x, grad_y, None, None, None, *grad_parameters


def _rows_at_once(plan: TileConfig, columns: int) -> int:
    return max(1, min(plan.tile, ELEMENTS // max(1, columns)))


def per_row(
    function: RowFunction,
    x: Tensor,
    y: Tensor,
    columns: NegativeMask,
    *parameters: Tensor,
    views: bool = False,
    together: bool = True,
) -> Tensor:
    """Return ``function(similarities, bias, *parameters)`` of each row of ``x``.

    Args:
        function: Gets ``(R, M)`` similarities, ``(R, M)`` to add to the logits (minus infinity where a column is left
            out) and the parameters, and returns ``(R,)``; each value depends on its own row only.
        x: Unit rows of this rank, ``(N, D)``.
        y: Columns, ``(M_r, D)``.
        columns: What is left out.
        *parameters: Learned tensors that the function uses.
        views: True: ``y`` is ``x``, two views of N / 2 images, and an anchor never meets itself.
        together: True: ``y`` is this rank's share of the columns. False: every rank holds all the columns.

    Returns:
        ``(N,)``.
    """
    return cast("Tensor", _PerRow.apply(function, x, y, columns, views, together, *parameters))
