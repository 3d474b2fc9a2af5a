"""Masks of I-JEPA: blocks of patches to predict, and blocks to predict them from."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_range, require
from lightning_contrast.seeding import send

TRIES = 20  # positions of a context block before one more target may overlap it


class JepaMasks(NamedTuple):
    """Which patches of a batch are visible and which are predicted, as indices into the raster of patches.

    Attributes:
        context: The patches that the context encoder sees, ``(B, N_c)`` int64, or ``(B, C, N_c)`` with C > 1 contexts;
            ascending in each row.
        targets: The patches of each target block, ``(B, T, N_t)`` int64, ascending in each block; blocks may overlap
            each other.
        relaxed: The images with a context that was allowed to overlap targets, ``(B,)`` bool, always on the CPU.
            Context and targets of all others have no patch in common.
    """

    context: Tensor
    targets: Tensor
    relaxed: Tensor

    def to(self, device: torch.device) -> "JepaMasks":
        """Return the masks with their indices on ``device``, without synchronizing with the host."""
        return JepaMasks(send(self.context, device), send(self.targets, device), self.relaxed)


class JepaMaskSampler:
    """Sample I-JEPA's masks: target blocks anywhere, and large context blocks without the patches of the targets.

    Implements the multi-block masks of I-JEPA (https://arxiv.org/abs/2301.08243) as the reference implementation does:
    one draw sets scale and aspect of all target blocks of a batch, so large blocks are always tall, and another one the
    size of the square context blocks. Positions are drawn per block; the last row and column of the grid are never
    part of one. A context keeps more than ``min_keep`` patches; otherwise it is drawn again, and after every 20
    failures one more target, from the last to the first, may overlap it (`JepaMasks.relaxed`). All contexts of a batch
    are then cut to the length of the shortest, from the bottom rows.

    Everything is drawn on the CPU, from torch's global generator unless another is given, so the numbers are the same
    on every device and no device is synchronized.
    Differs from it: the reference implementation seeds the sizes with a step counter of its own; here ranks whose
    generators differ draw different sizes. It applies ``min_keep`` to targets as well, and then never ends on a small
    grid.

    Args:
        grid: Rows and columns of patches, each >= 2; 14 x 14 for 224 pixels and patches of 16.
        targets: Number of target blocks, >= 1.
        target_scale: Range of a target block's share of the patches, in (0, 1].
        target_aspect: Range of a target block's height over its width, > 0.
        context_scale: Range of the context block's share of the patches, in (0, 1].
        min_keep: A context has more patches than this, >= 0.
        contexts: Number of contexts of each image, >= 1; each predicts all targets. 1 in the paper.
        disjoint_targets: Whether targets avoid each other: each is drawn among the positions that overlap the previous
            ones least, which is not at all if the grid has space left. False in the paper.

    Raises:
        ValueError: If a number is out of its range, a range is out of order, or the smallest context block has no
            more than ``min_keep`` patches.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        *,
        targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_keep: int = 10,
        contexts: int = 1,
        disjoint_targets: bool = False,
    ) -> None:
        for size in grid:
            check_at_least("grid", size, 2, "Give larger images or smaller patches")
        check_at_least("targets", targets, 1)
        check_at_least("min_keep", min_keep, 0)
        check_at_least("contexts", contexts, 1)
        for name, values, high in (
            ("target_scale", target_scale, 1.0),
            ("target_aspect", target_aspect, math.inf),
            ("context_scale", context_scale, 1.0),
        ):
            check_range(name, values, 0.0, high)
            require(values[0] > 0, name, "start above 0", tuple(values), "Give a smallest value above 0")
        self.grid, self.targets, self.min_keep = (grid[0], grid[1]), targets, min_keep
        self.target_scale, self.target_aspect, self.context_scale = target_scale, target_aspect, context_scale
        self.contexts, self.disjoint_targets = contexts, disjoint_targets
        height, width = self._block_size(0.0, context_scale, (1.0, 1.0))
        smallest = height * width
        hint = "Lower `min_keep`, or give larger images or smaller patches"
        rule = f"be below the {smallest} patches of the smallest context block on a grid of {grid[0]} x {grid[1]}"
        require(min_keep < smallest, "min_keep", rule, min_keep, hint)

    def __call__(self, batch_size: int, generator: torch.Generator | None = None) -> JepaMasks:
        """Sample the masks of a batch, on the CPU.

        Args:
            batch_size: Number of images B, >= 1.
            generator: Random number generator on the CPU; None uses the global one of torch.

        Returns:
            Contexts ``(B, N_c)`` or ``(B, C, N_c)`` and targets ``(B, T, N_t)``.
        """
        check_at_least("batch_size", batch_size, 1)
        shares = torch.rand(2, generator=generator, device="cpu", dtype=torch.float32).tolist()
        size = self._block_size(shares[0], self.target_scale, self.target_aspect)
        if self.disjoint_targets:
            corners = self._disjoint_corners(size, batch_size, generator)
        else:
            corners = self._corners(size, (batch_size, self.targets), generator)
        targets = corners.unsqueeze(2) + self._offsets(size)  # (B, T, N_t)
        taken = torch.zeros(batch_size, self.targets, math.prod(self.grid), dtype=torch.bool, device="cpu")
        taken.scatter_(2, targets, True)
        size = self._block_size(shares[1], self.context_scale, (1.0, 1.0))
        visible, relaxed = self._contexts(size, taken.repeat_interleave(self.contexts, 0), generator)  # (B C, N)
        length = int(visible.sum(1).min())
        first = visible.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # visible patches, in raster order
        context = first[:, :length].contiguous()
        if self.contexts > 1:
            context, relaxed = context.view(batch_size, -1, length), relaxed.view(batch_size, -1).any(1)
        return JepaMasks(context, targets, relaxed)

    def _block_size(self, share: float, scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        """Compute rows and columns of a block whose scale and aspect lie at ``share`` of their ranges."""
        area = int(math.prod(self.grid) * (scale[0] + share * (scale[1] - scale[0])))
        ratio = aspect[0] + share * (aspect[1] - aspect[0])
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return max(1, min(height, self.grid[0] - 1)), max(1, min(width, self.grid[1] - 1))

    def _corners(self, size: tuple[int, int], shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Draw the index of the upper left patch of blocks, int64 of the given shape."""
        top = torch.randint(0, self.grid[0] - size[0], shape, generator=generator, device="cpu")
        left = torch.randint(0, self.grid[1] - size[1], shape, generator=generator, device="cpu")
        return top * self.grid[1] + left

    def _disjoint_corners(self, size: tuple[int, int], batch_size: int, generator: torch.Generator | None) -> Tensor:
        """Draw the upper left patches ``(B, T)`` of blocks one after the other, with the least overlap."""
        rows, columns = (torch.arange(self.grid[i] - size[i], device="cpu") for i in range(2))
        corners = (rows.unsqueeze(1) * self.grid[1] + columns).flatten()  # (P,)
        blocks = torch.zeros(len(corners), math.prod(self.grid), device="cpu")  # (P, N)
        blocks.scatter_(1, corners.unsqueeze(1) + self._offsets(size), 1.0)
        taken, chosen = torch.zeros(batch_size, blocks.shape[1], device="cpu"), []
        for _ in range(self.targets):
            overlap = taken @ blocks.T  # (B, P): patches in common with earlier blocks
            free = overlap == overlap.amin(1, keepdim=True)
            chosen.append(torch.multinomial(free.float(), 1, generator=generator).squeeze(1))
            taken = torch.maximum(taken, blocks[chosen[-1]])
        return corners[torch.stack(chosen, dim=1)]

    def _offsets(self, size: tuple[int, int]) -> Tensor:
        """Compute the indices of a block's patches relative to its upper left one, ``(height * width,)``."""
        rows, columns = torch.arange(size[0], device="cpu"), torch.arange(size[1], device="cpu")
        return (rows.unsqueeze(1) * self.grid[1] + columns).flatten()

    def _contexts(
        self, size: tuple[int, int], taken: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw contexts until all have enough patches.

        Args:
            size: Rows and columns of the context blocks.
            taken: The patches of the targets of each context, ``(B, T, N)`` bool.
            generator: See ``__call__``.

        Returns:
            The patches of each context, ``(B, N)`` bool, and whether targets may overlap it, ``(B,)`` bool.
        """
        batch_size, targets, patches = taken.shape
        visible = torch.zeros(batch_size, patches, dtype=torch.bool, device="cpu")
        relaxed = torch.zeros(batch_size, dtype=torch.bool, device="cpu")
        pending, failures = torch.arange(batch_size, device="cpu"), 0
        while len(pending) > 0:  # terminates: without targets to avoid, every block has enough patches
            avoided = max(targets - failures // TRIES, 0)
            corners = self._corners(size, (len(pending), 1), generator)
            blocks = torch.zeros(len(pending), patches, dtype=torch.bool, device="cpu")
            blocks.scatter_(1, corners + self._offsets(size), True)
            blocks &= ~taken[pending, :avoided].any(1)
            enough = blocks.sum(1) > self.min_keep
            visible[pending[enough]] = blocks[enough]
            relaxed[pending[enough]] = avoided < targets
            pending, failures = pending[~enough], failures + 1
        return visible, relaxed


def repeat_rows(rows: Tensor, count: int) -> Tensor:
    """Repeat each row ``(B, ...)`` ``count`` times in place, ``(count B, ...)``."""
    return rows if count == 1 else rows.repeat_interleave(count, 0)
