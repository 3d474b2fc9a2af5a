"""Sums over the tiles of a similarity matrix that is never formed: plain arithmetic, no autograd, no communication.

A tile of ``tile x tile`` logits stays in the cache of a processor core while it is exponentiated and summed. Of a
symmetric matrix only the tiles on and above the diagonal are computed; each serves its rows and its columns.

Where the logits are known to be bounded (cosines times a known, moderate scale) ``exp`` is taken as it is. Where they
are not, every tile is shifted by the running maximum of each row, which costs one more pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

CPU_TILE, ACCELERATOR_TILE = 1024, 4096  # 4 MiB and 64 MiB of float32
# Cosines times these scales, summed over 1e9 columns, neither overflow nor underflow.
EXP_LIMITS = {torch.float32: 60.0, torch.float64: 600.0}


class Diagonal(NamedTuple):
    """Pairs to leave out: row ``first_row + n`` and column ``first_column + n`` for ``n < length``."""

    first_row: int
    first_column: int
    length: int


@dataclass(frozen=True)
class TileConfig:
    """How a sweep over the tiles is done.

    Args:
        tile: Largest number of rows and of columns of a tile.
        bounded: True where ``exp`` of every logit, and sums of them, fit the dtype.
        skip: Pairs to leave out.
        groups: Group of each row ``(N,)`` and of each column ``(M,)``: pairs of equal groups are left out.
        bias: What is added to all logits of a column, ``(M,)``: minus infinity leaves the column out.
    """

    tile: int
    bounded: bool
    skip: tuple[Diagonal, ...] = ()
    groups: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None


def make_plan(
    x: Tensor,
    scale: float | Tensor,
    tile_size: int | None,
    skip: tuple[Diagonal, ...] = (),
    groups: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> TileConfig:
    """Return the plan for unit rows ``x`` and a scale; a scale on the device is not read, hence not known."""
    tile = tile_size or (CPU_TILE if x.device.type == "cpu" else ACCELERATOR_TILE)
    bounded = not isinstance(scale, Tensor) and scale <= EXP_LIMITS.get(x.dtype, 0.0)
    return TileConfig(tile, bounded, skip, groups, bias)


def leave_out(logits: Tensor, i: slice, j: slice, plan: TileConfig) -> Tensor:
    """Add the bias, and write minus infinity where the plan leaves pairs out, in place.

    Args:
        logits: The tile of rows ``i`` and columns ``j``.
        i: Rows of the tile.
        j: Columns of the tile.
        plan: See `TileConfig`.
    """
    if plan.bias is not None:
        logits += plan.bias[j]
    if plan.groups is not None:
        rows, columns = plan.groups
        logits.masked_fill_(rows[i, None] == columns[None, j], -torch.inf)
    for first_row, first_column, length in plan.skip:
        start, stop = max(i.start, first_row), min(i.stop, first_row + length)
        if start < stop:
            band = logits[start - i.start : stop - i.start]
            offset = first_column + start - first_row - j.start
            if -len(band) < offset < band.shape[1]:
                band.diagonal(offset).fill_(-torch.inf)
    return logits


def split(size: int, tile: int) -> list[slice]:
    """Cut ``size`` rows into even parts of at most ``tile``."""
    parts = max(1, -(-size // tile))
    cuts = [size * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


class Tiles:
    """Logits of one tile after the other, in one buffer that is overwritten.

    Args:
        rows: Scaled rows, ``(N, D)``.
        columns: Columns, ``(M, D)``.
        plan: See `TileConfig`.
        triangle: True: rows and columns are the same points, tiles below the diagonal are left out.
    """

    def __init__(self, rows: Tensor, columns: Tensor, plan: TileConfig, triangle: bool = False) -> None:
        self.rows, self.columns, self.plan, self.triangle = rows, columns, plan, triangle
        area = min(plan.tile, len(rows)) * min(plan.tile, len(columns))
        self._buffer = rows.new_empty(area)
        self._work = rows.new_empty(0)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        for i in split(len(self.rows), self.plan.tile):
            for j in split(len(self.columns), self.plan.tile):
                if not self.triangle or i.start <= j.start:
                    yield i, j, self._logits(i, j)

    def _logits(self, i: slice, j: slice) -> Tensor:
        height, width = i.stop - i.start, j.stop - j.start
        logits = self._buffer[: height * width].view(height, width)
        torch.mm(self.rows[i], self.columns[j].T, out=logits)
        return leave_out(logits, i, j, self.plan)

    def work(self, like: Tensor) -> Tensor:
        """Return a second buffer in the shape of a tile."""
        if len(self._work) == 0:
            self._work = torch.empty_like(self._buffer)
        return self._work[: like.numel()].view_as(like)


class RunningLse:
    """Log-sum-exp of rows (or columns) whose logits come in tiles.

    Args:
        size: Number of rows.
        like: Tensor whose dtype and device are used.
        bounded: True: tiles come as exponentials. False: as logits.
    """

    def __init__(self, size: int, like: Tensor, bounded: bool) -> None:
        self.total = like.new_zeros(size)
        # Finite, so that a row of which everything is left out so far gives exp(-inf) = 0 and not a NaN.
        self.peak = None if bounded else like.new_full((size,), torch.finfo(like.dtype).min / 2)

    def add(self, part: slice, tile: Tensor, dim: int, work: Tensor | None) -> None:
        """Take in the tile of rows ``part``, summed over ``dim``."""
        if self.peak is None or work is None:
            self.total[part] += tile.sum(dim)
            return
        peak = torch.maximum(self.peak[part], tile.amax(dim))
        torch.sub(tile, peak.unsqueeze(dim), out=work).exp_()
        self.total[part] = self.total[part] * (self.peak[part] - peak).exp() + work.sum(dim)
        self.peak[part] = peak

    def result(self) -> Tensor:
        """Return the log-sum-exp, minus infinity where every logit was left out."""
        lse = self.total.log()
        return lse if self.peak is None else lse + self.peak


def sweep_lse(
    rows: Tensor,
    columns: Tensor,
    plan: TileConfig,
    *,
    of_columns: bool = False,
    triangle: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each row and of each column of ``rows @ columns.T`` with what the plan adds.

    Args:
        rows: Scaled rows, ``(N, D)``.
        columns: Columns, ``(M, D)``.
        plan: See `TileConfig`.
        of_columns: Whether the columns are asked for.
        triangle: Rows and columns are the same points; both results are then the rows'.

    Returns:
        ``(N,)`` and ``(M,)``; the second is meaningless where it is not asked for.
    """
    tiles = Tiles(rows, columns, plan, triangle)
    by_row = RunningLse(len(rows), rows, plan.bounded)
    by_column = by_row if triangle else RunningLse(len(columns), rows, plan.bounded)
    for i, j, tile in tiles:
        if plan.bounded:
            tile.exp_()
        work = None if plan.bounded else tiles.work(tile)
        by_row.add(i, tile, 1, work)
        if of_columns or (triangle and i != j):
            by_column.add(j, tile, 0, work)
    return by_row.result(), by_column.result()


@dataclass(frozen=True)
class LogSumExpGradient:
    """Gradient with respect to log-sum-exps, and the log-sum-exps themselves, both ``(N,)``."""

    grad: Tensor
    lse: Tensor

    def folded(self) -> Tensor:
        """Return the factor that turns ``exp(logit)`` into the gradient with respect to the logit."""
        return torch.where(self.lse.isneginf(), 0.0, self.grad * (-self.lse).exp())

    def safe_lse(self) -> Tensor:
        """Return the log-sum-exp, 0 where everything was left out: its exponentials are 0 all the same."""
        return self.lse.masked_fill(self.lse.isneginf(), 0.0)


def sweep_gradient(
    rows: Tensor,
    scaled: Tensor,
    columns: Tensor,
    plan: TileConfig,
    *,
    by_row: LogSumExpGradient | None,
    by_column: LogSumExpGradient | None,
    need_rows: bool = True,
    need_columns: bool = False,
    triangle: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``G @ columns`` and ``G.T @ rows``, where ``G`` is the gradient with respect to the logits.

    ``G[i, j] = grad_i exp(logit_ij - lse_i) + grad_j exp(logit_ij - lse_j)``, the softmax of each row and each column.

    Args:
        rows: Unscaled rows, ``(N, D)``.
        scaled: The rows that the logits were made of, ``(N, D)``.
        columns: Columns, ``(M, D)``.
        plan: See `TileConfig`, as in `sweep_lse`.
        by_row: Weights of the rows' log-sum-exp, ``(N,)``.
        by_column: Weights of the columns', ``(M,)``.
        need_rows: Whether the first result is asked for.
        need_columns: Whether the second is.
        triangle: Rows and columns are the same points: the first result is the sum of both.

    Returns:
        ``(N, D)`` and ``(M, D)``; zeros where not asked for.
    """
    tiles = Tiles(scaled, columns, plan, triangle)
    grad_rows = torch.zeros_like(rows)
    grad_columns = grad_rows if triangle else torch.zeros_like(columns)
    factors = [w.folded() if w is not None else None for w in (by_row, by_column)]
    shifts = [w.safe_lse() if w is not None else None for w in (by_row, by_column)]
    for i, j, tile in tiles:
        if plan.bounded:
            gradient = _bounded_gradient(tile, tiles.work(tile), factors[0], factors[1], i, j)
        else:
            gradient = _shifted_gradient(tile, tiles.work(tile), (by_row, shifts[0]), (by_column, shifts[1]), i, j)
        if need_rows:
            grad_rows[i].addmm_(gradient, columns[j])
        if need_columns or (triangle and i != j):
            grad_columns[j].addmm_(gradient.T, rows[i])
    return grad_rows, grad_columns


def _bounded_gradient(
    tile: Tensor, work: Tensor, row_factor: Tensor | None, column_factor: Tensor | None, i: slice, j: slice
) -> Tensor:
    """Turn logits into their gradient in place with one ``exp`` for rows and columns."""
    tile.exp_()
    if row_factor is not None and column_factor is not None:
        return tile.mul_(torch.add(row_factor[i, None], column_factor[None, j], out=work))
    if row_factor is not None:
        return tile.mul_(row_factor[i, None])
    if column_factor is not None:
        return tile.mul_(column_factor[None, j])
    return tile.zero_()


def _shifted_gradient(
    tile: Tensor,
    work: Tensor,
    row: tuple[LogSumExpGradient | None, Tensor | None],
    column: tuple[LogSumExpGradient | None, Tensor | None],
    i: slice,
    j: slice,
) -> Tensor:
    """Turn logits into their gradient in place, with an ``exp`` for the rows and one for the columns."""
    weights, shift = row
    if weights is None or shift is None:
        work.zero_()
    else:
        torch.sub(tile, shift[i, None], out=work).exp_().mul_(weights.grad[i, None])
    weights, shift = column
    if weights is not None and shift is not None:
        tile.sub_(shift[None, j]).exp_().mul_(weights.grad[None, j])
        work.add_(tile)
    return work
