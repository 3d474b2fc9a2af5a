"""Masks of I-JEPA: target blocks of patches, and a context block to predict them from."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_range, require

TRIES = 20  # positions of a context block before one more target may overlap it


class JepaMasks(NamedTuple):
    """Context and target patches of a batch, as indices into the row-major grid of patches.

    Attributes:
        context: The patches of the context, ``(B, N_c)`` int64, ascending in each row.
        targets: The patches of each target block, ``(B, T, N_t)`` int64, ascending in each block; blocks may overlap
            each other.
        relaxed: The images whose context was allowed to overlap targets, ``(B,)`` bool; it always stays on the CPU.
            Context and targets of all others have no patch in common.
    """

    context: Tensor
    targets: Tensor
    relaxed: Tensor

    def to(self, device: torch.device) -> "JepaMasks":
        """Return the masks with their indices on ``device``, copied without synchronization."""
        return JepaMasks(_send(self.context, device), _send(self.targets, device), self.relaxed)


class JepaMaskSampler:
    """Draw I-JEPA's masks: target blocks at random positions, and a large context block without the targets' patches.

    Implements the multi-block masks of I-JEPA (https://arxiv.org/abs/2301.08243) as its reference implementation: one
    draw sets scale and aspect of all target blocks of a batch, so large blocks are always tall, another one the size of
    the square context blocks. Positions are drawn for each block; the last row and column of the grid are never in one.
    A context keeps more than ``min_keep`` patches. One that does not is drawn again, and after every 20 failures one
    more target, from the last to the first, may overlap it (`JepaMasks.relaxed`). All contexts of a batch are then cut
    to the length of the shortest; their bottom rows go first.

    Masks are drawn on the CPU, from torch's global generator unless another is given, so they do not depend on the
    device and need no synchronization.
    Differs from it: the reference seeds the sizes with a step counter; here ranks with different generators draw
    different sizes. The reference applies ``min_keep`` to targets too, and then does not terminate on a small grid.

    Args:
        grid: Rows and columns of patches, each >= 2; 14 x 14 for 224 pixels and patches of 16.
        targets: Number of target blocks, >= 1.
        target_scale: Range of a target block's share of the patches, in (0, 1].
        target_aspect: Range of a target block's height over its width, > 0.
        context_scale: Range of the context block's share of the patches, in (0, 1].
        min_keep: Lower bound (exclusive) of the number of context patches, >= 0.

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
    ) -> None:
        for size in grid:
            check_at_least("grid", size, 2, "Give larger images or smaller patches")
        check_at_least("targets", targets, 1)
        check_at_least("min_keep", min_keep, 0)
        for name, values, high in (
            ("target_scale", target_scale, 1.0),
            ("target_aspect", target_aspect, math.inf),
            ("context_scale", context_scale, 1.0),
        ):
            check_range(name, values, 0.0, high)
            require(values[0] > 0, name, "start above 0", tuple(values), "Give a smallest value above 0")
        self.grid, self.targets, self.min_keep = (grid[0], grid[1]), targets, min_keep
        self.target_scale, self.target_aspect, self.context_scale = target_scale, target_aspect, context_scale
        height, width = self._block_size(0.0, context_scale, (1.0, 1.0))
        smallest = height * width
        hint = "Lower `min_keep`, or give larger images or smaller patches"
        rule = f"be below the {smallest} patches of the smallest context block on a grid of {grid[0]} x {grid[1]}"
        require(min_keep < smallest, "min_keep", rule, min_keep, hint)

    def __call__(self, batch_size: int, generator: torch.Generator | None = None) -> JepaMasks:
        """Return the masks of a batch, on the CPU.

        Args:
            batch_size: Number of images B, >= 1.
            generator: A generator of the CPU; None is torch's global one.
        """
        check_at_least("batch_size", batch_size, 1)
        shares = torch.rand(2, generator=generator, device="cpu", dtype=torch.float32).tolist()
        size = self._block_size(shares[0], self.target_scale, self.target_aspect)
        corners = self._corners(size, (batch_size, self.targets), generator)
        targets = corners.unsqueeze(2) + self._offsets(size)  # (B, T, N_t)
        taken = torch.zeros(batch_size, self.targets, math.prod(self.grid), dtype=torch.bool, device="cpu")
        taken.scatter_(2, targets, True)
        size = self._block_size(shares[1], self.context_scale, (1.0, 1.0))
        seen, relaxed = self._contexts(size, taken, generator)
        length = int(seen.sum(1).min())
        first = seen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # seen patches, in raster order
        return JepaMasks(first[:, :length].contiguous(), targets, relaxed)

    def _block_size(self, share: float, scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        """Return rows and columns of a block whose scale and aspect lie at ``share`` of their ranges."""
        area = int(math.prod(self.grid) * (scale[0] + share * (scale[1] - scale[0])))
        ratio = aspect[0] + share * (aspect[1] - aspect[0])
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return max(1, min(height, self.grid[0] - 1)), max(1, min(width, self.grid[1] - 1))

    def _corners(self, size: tuple[int, int], shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Return random places of the upper left patch of blocks, int64 of the given shape."""
        top = torch.randint(0, self.grid[0] - size[0], shape, generator=generator, device="cpu")
        left = torch.randint(0, self.grid[1] - size[1], shape, generator=generator, device="cpu")
        return top * self.grid[1] + left

    def _offsets(self, size: tuple[int, int]) -> Tensor:
        """Return the places of a block's patches counted from its upper left one, ``(height * width,)``."""
        rows, columns = torch.arange(size[0], device="cpu"), torch.arange(size[1], device="cpu")
        return (rows.unsqueeze(1) * self.grid[1] + columns).flatten()

    def _contexts(
        self, size: tuple[int, int], taken: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw contexts until all have enough patches.

        Args:
            size: Rows and columns of the context blocks.
            taken: The patches of each target, ``(B, T, N)`` bool.
            generator: See ``__call__``.

        Returns:
            The patches of each context, ``(B, N)`` bool, and the images whose targets may overlap it, ``(B,)`` bool.
        """
        batch_size, targets, patches = taken.shape
        seen = torch.zeros(batch_size, patches, dtype=torch.bool, device="cpu")
        relaxed = torch.zeros(batch_size, dtype=torch.bool, device="cpu")
        pending, failures = torch.arange(batch_size, device="cpu"), 0
        while len(pending) > 0:  # ends: without targets to avoid, every block has enough patches
            avoided = max(targets - failures // TRIES, 0)
            corners = self._corners(size, (len(pending), 1), generator)
            blocks = torch.zeros(len(pending), patches, dtype=torch.bool, device="cpu")
            blocks.scatter_(1, corners + self._offsets(size), True)
            blocks &= ~taken[pending, :avoided].any(1)
            enough = blocks.sum(1) > self.min_keep
            seen[pending[enough]] = blocks[enough]
            relaxed[pending[enough]] = avoided < targets
            pending, failures = pending[~enough], failures + 1
        return seen, relaxed


def _send(indices: Tensor, device: torch.device) -> Tensor:
    """Copy to a device, from pinned memory so that the copy is asynchronous."""
    if device.type == "cpu":
        return indices
    return (indices.pin_memory() if device.type == "cuda" else indices).to(device, non_blocking=True)
