"""Log-sum-exps over a tiled similarity matrix and their gradients: plain arithmetic, no autograd, no communication.

A tile of ``tile x tile`` logits stays in the cache of a processor core while it is exponentiated and summed. For a
symmetric matrix only the tiles on and above the diagonal are computed; each contributes to its rows and its columns.

If the logits are known to be bounded (cosines times a known, moderate scale), ``exp`` is applied directly. Otherwise
every tile is shifted by the running maximum of each row, which costs one more pass over the tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

CPU_TILE, ACCELERATOR_TILE = 1024, 4096  # 4 MiB and 64 MiB of float32
# Exponentials of cosines times these scales, summed over 1e9 columns, neither overflow nor underflow.
EXP_LIMITS = {torch.float32: 60.0, torch.float64: 600.0}


class Diagonal(NamedTuple):
    """Masked pairs: row ``first_row + n`` with column ``first_column + n`` for ``n < length``."""

    first_row: int
    first_column: int
    length: int


@dataclass(frozen=True)
class TileConfig:
    """Tile size and masked pairs of a similarity matrix.

    Args:
        tile: Largest number of rows and of columns of a tile.
        bounded: True if ``exp`` of every logit, and sums of them, fit the dtype.
        skip: Masked pairs.
        groups: Group of each row ``(N,)`` and of each column ``(M,)``: pairs of equal groups are masked.
        bias: Added to all logits of a column, ``(M,)``: minus infinity masks the column.
    """

    tile: int
    bounded: bool
    skip: tuple[Diagonal, ...] = ()
    groups: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None


def make_tile_config(
    x: Tensor,
    scale: float | Tensor,
    tile_size: int | None,
    skip: tuple[Diagonal, ...] = (),
    groups: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> TileConfig:
    """Choose the tile size for unit rows ``x`` ``(N, D)``, and whether their logits are bounded.

    Args:
        x: Unit rows, ``(N, D)``.
        scale: Factor of the similarities, a number or a scalar tensor, which is not read on the host and therefore
            counts as unbounded.
        tile_size: Largest edge of a tile; None chooses by device.
        skip: See `TileConfig`.
        groups: See `TileConfig`.
        bias: See `TileConfig`.
    """
    tile = tile_size or (CPU_TILE if x.device.type == "cpu" else ACCELERATOR_TILE)
    bounded = not isinstance(scale, Tensor) and scale <= EXP_LIMITS.get(x.dtype, 0.0)
    return TileConfig(tile, bounded, skip, groups, bias)


def mask_logits(logits: Tensor, i: slice, j: slice, config: TileConfig) -> Tensor:
    """Add the bias and set masked pairs to minus infinity, in place.

    Args:
        logits: The tile of rows ``i`` and columns ``j``, shape ``(len(i), len(j))``.
        i: Rows of the tile.
        j: Columns of the tile.
        config: See `TileConfig`.
    """
    if config.bias is not None:
        logits += config.bias[j]
    if config.groups is not None:
        rows, columns = config.groups
        logits.masked_fill_(rows[i, None] == columns[None, j], -torch.inf)
    for first_row, first_column, length in config.skip:
        start, stop = max(i.start, first_row), min(i.stop, first_row + length)
        if start < stop:
            band = logits[start - i.start : stop - i.start]
            offset = first_column + start - first_row - j.start
            if -len(band) < offset < band.shape[1]:
                band.diagonal(offset).fill_(-torch.inf)
    return logits


def split(size: int, tile: int) -> list[slice]:
    """Split ``size`` rows into even parts of at most ``tile``."""
    parts = max(1, -(-size // tile))
    cuts = [size * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


class Tiles:
    """Iterator over tiles of logits, all in one buffer that is overwritten.

    Args:
        rows: Scaled rows, ``(N, D)``.
        columns: Columns, ``(M, D)``.
        config: See `TileConfig`.
        triangle: Rows and columns are the same points; tiles below the diagonal are skipped.
    """

    def __init__(self, rows: Tensor, columns: Tensor, config: TileConfig, triangle: bool = False) -> None:
        self.rows, self.columns, self.config, self.triangle = rows, columns, config, triangle
        area = min(config.tile, len(rows)) * min(config.tile, len(columns))
        self._buffer = rows.new_empty(area)
        self._work = rows.new_empty(0)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        for i in split(len(self.rows), self.config.tile):
            for j in split(len(self.columns), self.config.tile):
                if not self.triangle or i.start <= j.start:
                    yield i, j, self._logits(i, j)

    def _logits(self, i: slice, j: slice) -> Tensor:
        height, width = i.stop - i.start, j.stop - j.start
        logits = self._buffer[: height * width].view(height, width)
        torch.mm(self.rows[i], self.columns[j].T, out=logits)
        return mask_logits(logits, i, j, self.config)

    def work(self, like: Tensor) -> Tensor:
        """Return a second buffer in the shape of a tile."""
        if len(self._work) == 0:
            self._work = torch.empty_like(self._buffer)
        return self._work[: like.numel()].view_as(like)


class RunningLogSumExp:
    """Log-sum-exp of rows (or columns) whose logits arrive tile by tile.

    Args:
        bounded: True: tiles hold exponentials. False: tiles hold logits.
    """

    def __init__(self, bounded: bool) -> None:
        self.bounded = bounded
        self._totals: dict[int, Tensor] = {}  # by the first row of a part: the first tile's sum needs no addition
        self._peaks: dict[int, Tensor] = {}

    def add(self, part: slice, tile: Tensor, dim: int, work: Tensor | None) -> None:
        """Add the tile of rows ``part``, shape ``(rows, columns)``, summed over ``dim``.

        Args:
            part: Rows of the tile, or columns with ``dim=0``.
            tile: Exponentials or logits.
            dim: Dimension to sum over.
            work: Buffer in the shape of the tile; needed for logits only.
        """
        start = part.start
        if work is None:
            total = tile.sum(dim)
            self._totals[start] = self._totals[start].add_(total) if start in self._totals else total
            return
        # The floor is finite: a row with all logits masked so far gives exp(-inf) = 0 and no NaN.
        peak = tile.amax(dim).clamp_min_(torch.finfo(tile.dtype).min / 2)
        if start in self._peaks:
            peak = torch.maximum(self._peaks[start], peak)
        total = torch.sub(tile, peak.unsqueeze(dim), out=work).exp_().sum(dim)
        if start in self._peaks:
            total += self._totals[start] * (self._peaks[start] - peak).exp()
        self._totals[start], self._peaks[start] = total, peak

    def result(self) -> Tensor:
        """Return the log-sum-exps, ``(N,)``; minus infinity where every logit is masked."""
        lse = torch.cat([self._totals[start] for start in sorted(self._totals)]).log()
        return lse if self.bounded else lse + torch.cat([self._peaks[start] for start in sorted(self._peaks)])


def sweep_lse(
    rows: Tensor,
    columns: Tensor,
    config: TileConfig,
    *,
    of_columns: bool = False,
    triangle: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the log-sum-exp of each row, and optionally of each column, of the masked ``rows @ columns.T``.

    Args:
        rows: Scaled rows, ``(N, D)``.
        columns: Columns, ``(M, D)``.
        config: See `TileConfig`.
        of_columns: Whether to compute the second result.
        triangle: Rows and columns are the same points, so that only half of the tiles are computed.

    Returns:
        ``(N,)``, and ``(M,)`` or None.
    """
    tiles = Tiles(rows, columns, config, triangle)
    by_row = RunningLogSumExp(config.bounded)
    by_column = by_row if triangle else RunningLogSumExp(config.bounded)
    for i, j, tile in tiles:
        if config.bounded:
            tile.exp_()
        work = None if config.bounded else tiles.work(tile)
        by_row.add(i, tile, 1, work)
        if of_columns or (triangle and i != j):
            by_column.add(j, tile, 0, work)
    return by_row.result(), by_column.result() if of_columns else None


@dataclass(frozen=True)
class LogSumExpGradient:
    """Gradient with respect to log-sum-exps, and the log-sum-exps themselves, ``(N,)`` each."""

    grad: Tensor
    lse: Tensor

    def factor(self) -> Tensor:
        """Return ``grad * exp(-lse)``, ``(N,)``, which turns ``exp(logit)`` into the gradient of the logit.

        Only for bounded logits. The clamp keeps the factor finite where every logit is masked, and acts nowhere else.
        """
        return self.lse.neg().clamp_(max=EXP_LIMITS[self.lse.dtype] + 1).exp_().mul_(self.grad)

    def shift(self) -> Tensor:
        """Return the log-sum-exps, ``(N,)``; 0 where every logit is masked, since ``exp(-inf - 0)`` is 0 as well."""
        return self.lse.masked_fill(self.lse.isneginf(), 0.0)


def sweep_gradient(
    rows: Tensor,
    scaled: Tensor,
    columns: Tensor,
    config: TileConfig,
    *,
    by_row: LogSumExpGradient | None,
    by_column: LogSumExpGradient | None,
    need_rows: bool = True,
    need_columns: bool = False,
    triangle: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute ``G @ columns`` and ``G.T @ rows``, where ``G`` is the gradient with respect to the logits.

    ``G[i, j] = grad_i exp(logit_ij - lse_i) + grad_j exp(logit_ij - lse_j)``, the softmax over each row and column.

    Args:
        rows: Unscaled rows, ``(N, D)``.
        scaled: The rows that the logits are made of, ``(N, D)``.
        columns: Columns, ``(M, D)``.
        config: The same as for `sweep_lse`.
        by_row: Gradient of the rows' log-sum-exps, ``(N,)``.
        by_column: Gradient of the columns' log-sum-exps, ``(M,)``.
        need_rows: Whether to compute the first result.
        need_columns: Whether to compute the second result.
        triangle: Rows and columns are the same points, and so are ``by_row`` and ``by_column``; the first result is
            the sum of both.

    Returns:
        ``(N, D)`` and ``(M, D)``; zeros where not computed.
    """
    tiles = Tiles(scaled, columns, config, triangle)
    grad_rows = PartialSums(rows, need_rows)
    grad_columns = grad_rows if triangle else PartialSums(columns, need_columns)
    row_terms = _terms(by_row, config)
    column_terms = row_terms if by_column is by_row else _terms(by_column, config)
    gradient_of = _bounded_gradient if config.bounded else _shifted_gradient
    for i, j, tile in tiles:
        gradient = gradient_of(tile, tiles.work(tile), row_terms, column_terms, i, j)
        if need_rows:
            grad_rows.add_product(i, gradient, columns[j])
        if need_columns or (triangle and i != j):
            grad_columns.add_product(j, gradient.T, rows[i])
    return grad_rows.total, grad_columns.total


class PartialSums:
    """Sums of matrix products, part by part.

    Args:
        like: Tensor with the shape ``(N, D)`` of the sums.
        needed: False: no product is added, and the sums stay zero.
    """

    def __init__(self, like: Tensor, needed: bool) -> None:
        self.total = torch.empty_like(like) if needed else torch.zeros_like(like)
        self._started: set[int] = set()

    def add_product(self, part: slice, a: Tensor, b: Tensor) -> None:
        """Add ``a @ b``, shape ``(rows, D)``, to the rows ``part``; the first product overwrites them."""
        self.total[part].addmm_(a, b, beta=int(part.start in self._started))
        self._started.add(part.start)


Terms = tuple[Tensor, Tensor]


def _terms(gradient: LogSumExpGradient | None, config: TileConfig) -> Terms | None:
    """Return gradient and factor (bounded) or gradient and shift of each row, ``(N,)`` each."""
    if gradient is None:
        return None
    return gradient.grad, gradient.factor() if config.bounded else gradient.shift()


def _bounded_gradient(
    tile: Tensor, work: Tensor, row: Terms | None, column: Terms | None, i: slice, j: slice
) -> Tensor:
    """Turn logits into their gradient in place, with one ``exp`` for rows and columns."""
    tile.exp_()
    if row is not None and column is not None:
        return tile.mul_(torch.add(row[1][i, None], column[1][None, j], out=work))
    if row is not None:
        return tile.mul_(row[1][i, None])
    if column is not None:
        return tile.mul_(column[1][None, j])
    return tile.zero_()


def _shifted_gradient(
    tile: Tensor, work: Tensor, row: Terms | None, column: Terms | None, i: slice, j: slice
) -> Tensor:
    """Turn logits into their gradient, with one ``exp`` for the rows and one for the columns."""
    if row is None:
        work.zero_()
    else:
        grad, shift = row
        torch.sub(tile, shift[i, None], out=work).exp_().mul_(grad[i, None])
    if column is not None:
        grad, shift = column
        work.add_(tile.sub_(shift[None, j]).exp_().mul_(grad[None, j]))
    return work
