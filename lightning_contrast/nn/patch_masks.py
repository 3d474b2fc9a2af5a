"""Mask samplers of masked prediction, with one interface: which patches of each image are hidden.

A sampler is called with the number of images, the grid of patches and a generator, and returns masks
``(images, patches)`` bool on the CPU, row by row, True where hidden. Everything is drawn on the host from torch's CPU
generator, so `StepSeed` makes masks a function of the step. `ibot_masks` and `dinov2_masks` have the same interface.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast._checks import (
    check_at_least,
    check_choice,
    check_interval,
    check_not_negative,
    check_range,
    fail,
    require,
)
from lightning_contrast.nn.masking import draw_blocks, seeded_random, unpack_masks

_TRIES = 1000  # draws of a clip's blocks until something stays visible

MaskSampler: TypeAlias = Callable[..., Tensor]
"""Called with ``(images, grid, generator=...)``; returns masks ``(images, patches)`` bool on the CPU."""


def random_masks(
    images: int,
    grid: tuple[int, int],
    *,
    ratio: float = 0.75,
    unit: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide patches anywhere: MAE's masks, and with larger units SimMIM's.

    Sources: MAE (https://arxiv.org/abs/2111.06377) with ``unit=1``, SimMIM (https://arxiv.org/abs/2111.09886) with
    units of 32 pixels, which are 2 patches of 16.

    Args:
        images: Number of masks, >= 1.
        grid: Rows and columns of patches, multiples of ``unit``.
        ratio: Share of hidden units, in (0, 1), rounded up to whole units.
        unit: Edge of the squares that are hidden as one, in patches, >= 1.
        generator: Random number generator on the CPU; None is torch's global one.

    Returns:
        Masks ``(images, rows * columns)`` bool on the CPU, all with the same number of hidden patches.

    Raises:
        ValueError: If the ratio hides nothing or all, or the grid is no multiple of the unit.
        TypeError: If a number that counts is not whole.

    Example:
        >>> random_masks(2, (4, 4), ratio=0.75).sum(1)
        tensor([12, 12])
    """
    check_at_least("images", images, 1)
    units = _units(grid, "unit", unit)
    count = math.prod(units)
    hidden = _hidden(ratio, count)
    order = torch.rand(images, count, generator=generator, dtype=torch.float32, device="cpu").argsort(1)
    mask = torch.zeros(images, count, dtype=torch.bool, device="cpu").scatter_(1, order[:, :hidden], True)
    return _enlarge(mask.view(images, *units), unit)


def grid_masks(
    images: int, grid: tuple[int, int], *, ratio: float = 0.75, generator: torch.Generator | None = None
) -> Tensor:
    """Show one patch of each square of k x k patches, the upper left one: the regular grid that MAE compares with.

    Args:
        images: Number of masks, >= 1.
        grid: Rows and columns of patches, multiples of k.
        ratio: Share of hidden patches, ``1 - 1 / k^2`` for a whole k >= 2, such as 0.75 for squares of 2 x 2.
        generator: Not used: nothing is drawn.

    Returns:
        Masks ``(images, rows * columns)`` bool on the CPU, all alike.

    Raises:
        ValueError: If there is no such k, or the grid is no multiple of it.
    """
    check_at_least("images", images, 1)
    _check_ratio(ratio)
    step = round((1 - ratio) ** -0.5)
    rule = "be 1 - 1 / k^2 for a whole k >= 2 in a regular grid"
    fits = step >= 2 and math.isclose(ratio, 1 - step**-2, abs_tol=1e-3)
    require(fits, "ratio", rule, ratio, "Give 0.75 to show one patch of four")
    _units(grid, "ratio", step)
    mask = torch.ones(images, *grid, dtype=torch.bool, device="cpu")
    mask[:, ::step, ::step] = False
    return mask.flatten(1)


def block_masks(
    images: int,
    grid: tuple[int, int],
    *,
    ratio: float = 0.6,
    smallest: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide blocks until a share of the patches is hidden: BEiT's masks, which data2vec uses.

    Where no further block fits, single patches fill up the number. Source: BEiT (https://arxiv.org/abs/2106.08254);
    heights and widths are drawn as in `ibot_masks`.

    Args:
        images: Number of masks, >= 1.
        grid: Rows and columns of patches.
        ratio: Share of hidden patches, in (0, 1), rounded up to whole patches.
        smallest: Area from which the size of a block is drawn, in patches, >= 1; None is a third of the shorter edge
            squared, 16 for 14 x 14 patches.
        generator: Where the seed is drawn from; None is torch's global CPU generator.

    Returns:
        Masks ``(images, rows * columns)`` bool on the CPU, all with the same number of hidden patches.

    Raises:
        ValueError: If the ratio hides nothing or all.
        TypeError: If a number that counts is not whole.
    """
    rng, (rows, columns) = seeded_random(images, grid, generator), grid
    patches = rows * columns
    hidden = _hidden(ratio, patches)
    if smallest is None:
        smallest = max(1, (min(grid) // 3) ** 2)
    check_at_least("smallest", smallest, 1)
    drawn = []
    for _ in range(images):
        mask = draw_blocks(rng, rows, columns, hidden, smallest, patches)
        visible = [patch for patch in range(patches) if not mask >> patch & 1]
        drawn.append(mask | sum(1 << patch for patch in rng.sample(visible, hidden - mask.bit_count())))
    return unpack_masks(drawn, patches)


def inverse_block_masks(
    images: int,
    grid: tuple[int, int],
    *,
    ratio: float = 0.8,
    block: int = 3,
    adjust: float = 0.07,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Show square blocks and hide the rest: the masks of data2vec 2.0.

    Blocks are drawn around random patches and cut at the border; single patches are added or removed until the number
    fits. Source: data2vec 2.0 (https://arxiv.org/abs/2212.07525) and its program in fairseq.

    Args:
        images: Number of masks, >= 1.
        grid: Rows and columns of patches.
        ratio: Share of hidden patches, in (0, 1), rounded up to whole patches.
        block: Edge of a visible block in patches, >= 1.
        adjust: Added to the share of visible patches when the number of blocks is computed, since blocks overlap, >= 0.
        generator: Random number generator on the CPU; None is torch's global one.

    Returns:
        Masks ``(images, rows * columns)`` bool on the CPU, all with the same number of hidden patches.

    Raises:
        ValueError: If the ratio hides nothing or all, the block is larger than the grid, or a number is out of range.
        TypeError: If a number that counts is not whole.
    """
    check_at_least("images", images, 1)
    check_at_least("block", block, 1)
    check_not_negative("adjust", adjust)
    require(block <= min(grid), "block", f"fit into the grid of {grid[0]} x {grid[1]}", block, "Give a smaller block")
    patches = math.prod(grid)
    visible = patches - _hidden(ratio, patches)
    count = max(1, int(patches * (1 - ratio + adjust) / block**2))
    draw = partial(torch.rand, images, patches, generator=generator, dtype=torch.float32, device="cpu")
    drawn, before = draw(), block // 2
    centers = torch.zeros_like(drawn).scatter_(1, drawn.argsort(1)[:, :count], 1.0).view(images, 1, *grid)
    shown = F.max_pool2d(F.pad(centers, (block - 1 - before, before) * 2), block, stride=1).flatten(1)
    order = (shown + draw()).argsort(1, descending=True)
    return torch.ones(images, patches, dtype=torch.bool, device="cpu").scatter_(1, order[:, :visible], False)


def tubelet_masks(
    images: int,
    grid: tuple[int, int, int],
    *,
    blocks: int = 8,
    scale: tuple[float, float] = (0.15, 0.15),
    aspect: tuple[float, float] = (0.75, 1.5),
    time_scale: tuple[float, float] = (1.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide blocks of tubelets in clips: V-JEPA's masks.

    One draw of time, scale and aspect sets the size of all blocks of a batch; positions are drawn per block, and again
    for a clip of which nothing would stay visible. Source: V-JEPA (https://arxiv.org/abs/2404.08471), whose short-range
    masks have 8 blocks of 0.15 and whose long-range masks have 2 blocks of 0.7.
    Differs from the reference implementation: it draws the size from a step counter of its own, alike on all ranks;
    here ranks whose generators differ draw different sizes.

    Args:
        images: Number of masks, one per clip, >= 1.
        grid: Tubelets over time, rows and columns.
        blocks: Number of blocks, >= 1, which may overlap.
        scale: Range of a block's share of a frame, in (0, 1].
        aspect: Range of a block's height over its width, > 0.
        time_scale: Range of a block's share of the time, in (0, 1].
        generator: Random number generator on the CPU; None is torch's global one.

    Returns:
        Masks ``(images, time * rows * columns)`` bool on the CPU, time by time and row by row. Numbers of hidden
        tubelets differ between clips.

    Raises:
        ValueError: If a range is out of order, one block can hide everything, or so many blocks practically always do.
        TypeError: If a number that counts is not whole.
    """
    check_at_least("images", images, 1)
    check_at_least("blocks", blocks, 1)
    for name, values, high in (("scale", scale, 1.0), ("aspect", aspect, math.inf), ("time_scale", time_scale, 1.0)):
        check_range(name, values, 0.0, high)
        require(values[0] > 0, name, "start above 0", tuple(values), "Give a smallest value above 0")
    for length in grid:
        check_at_least("grid", length, 1)
    depth, rows, columns = grid
    area = rows * columns * scale[1]
    lowest = 0.0 if rows == 1 else (rows - 0.5) ** 2 / area  # aspect from which on a block has all rows
    highest = math.inf if columns == 1 else area / (columns - 0.5) ** 2  # the last one with all columns
    covers = max(aspect[0], lowest) <= min(aspect[1], highest)
    rule = f"leave something visible of {depth} x {rows} x {columns} tubelets"
    hint = "Lower `scale` or `time_scale`, or give longer clips or smaller patches"
    leaves = not (covers and max(1, int(depth * time_scale[1])) == depth)
    require(leaves, "scale", rule, tuple(scale), hint)
    shares = torch.rand(3, generator=generator, dtype=torch.float32, device="cpu").tolist()
    time, space, ratio = (a + u * (b - a) for (a, b), u in zip((time_scale, scale, aspect), shares, strict=True))
    size = _block_size(grid, space, ratio, time)
    mask = torch.ones(images, *grid, dtype=torch.bool, device="cpu")
    pending = torch.arange(images, device="cpu")
    places = [torch.arange(length, device="cpu") for length in (depth, rows, columns)]
    for _ in range(_TRIES):
        hidden = torch.ones(len(pending), blocks, *grid, dtype=torch.bool, device="cpu")
        for axis, place in enumerate(places):
            shape = (len(pending), blocks, 1)
            corner = torch.randint(0, grid[axis] - size[axis] + 1, shape, generator=generator, device="cpu")
            inside = (place >= corner) & (place < corner + size[axis])  # (B, blocks, length)
            hidden &= inside.view(len(pending), blocks, *(grid[axis] if axis == i else 1 for i in range(3)))
        mask[pending] = hidden.any(1)
        pending = pending[mask[pending].flatten(1).all(1)]
        if len(pending) == 0:
            return mask.flatten(1)
    fail("blocks", rule, blocks, "Give fewer or smaller blocks")


MASKS: dict[str, MaskSampler] = {
    "random": random_masks,
    "grid": grid_masks,
    "block": block_masks,
    "inverse_block": inverse_block_masks,
}
"""Samplers for images by name; each takes the ``ratio`` of hidden patches."""


def build_masks(mask: str | MaskSampler, grid: tuple[int, ...], **settings: Any) -> MaskSampler:
    """Return a sampler with its settings, after one trial that shows that it fits the grid.

    Args:
        mask: A key of `MASKS`, or a sampler, which gets no settings and whose masks are checked at every call.
        grid: The grid of patches of the trial.
        **settings: Arguments of the named sampler, such as ``ratio``.

    Raises:
        ValueError: If the name is unknown, the settings do not fit the grid, or the sampler does not return masks
            ``(images, patches)`` bool that hide something and leave something visible in every image.
        TypeError: If ``mask`` is neither a name nor a callable.
    """
    if isinstance(mask, str):
        check_choice("mask", mask, tuple(MASKS))
        sampler: MaskSampler = partial(MASKS[mask], **settings)
    elif callable(mask):
        sampler = partial(_checked, mask)
    else:
        hint = f"Pass one of {', '.join(map(repr, MASKS))}, or a function (images, grid, generator=None) -> masks"
        fail("mask", "be a name or a callable", type(mask).__name__, hint, TypeError)
    check_mask(sampler(2, grid, generator=torch.Generator().manual_seed(0)), 2, grid)
    return sampler


def check_mask(mask: Tensor, images: int, grid: tuple[int, ...]) -> None:
    """Check masks that a sampler has drawn.

    Args:
        mask: The masks, expected to be ``(images, patches)`` bool on the CPU.
        images: Number of images.
        grid: The grid of patches.

    Raises:
        ValueError: If they have another shape, type or device, or an image with nothing hidden or nothing visible.
    """
    expected, hint = (images, math.prod(grid)), "Return one bool for each patch, True where hidden"
    found = (tuple(mask.shape), mask.dtype, mask.device.type)
    require(found == (expected, torch.bool, "cpu"), "mask", f"give bool masks {expected} on the CPU", found, hint)
    hidden = mask.sum(1)
    partly = bool(((hidden > 0) & (hidden < mask.shape[1])).all())
    rule = f"hide some of the {mask.shape[1]} patches of every image, and not all"
    require(partly, "mask", rule, sorted(set(hidden.tolist())), "Change the share of hidden patches")


def _checked(
    sampler: MaskSampler, images: int, grid: tuple[int, ...], *, generator: torch.Generator | None = None
) -> Tensor:
    """Return the masks of a sampler after `check_mask`; a module-level function, so that methods can be pickled."""
    mask = sampler(images, grid, generator=generator)
    check_mask(mask, images, grid)
    return mask


def _check_ratio(ratio: float) -> None:
    check_interval("ratio", ratio, "(0, 1)", "Give the share of hidden patches, such as 0.75")


def _hidden(ratio: float, count: int) -> int:
    """Return the number of hidden ones among ``count``, rounded up."""
    _check_ratio(ratio)
    hidden = math.ceil(round(ratio * count, 6))
    hint = "Lower the ratio, or give larger images or smaller patches"
    require(hidden < count, "ratio", f"leave one of {count} visible", ratio, hint)
    return hidden


def _units(grid: tuple[int, int], name: str, edge: int) -> tuple[int, int]:
    """Return rows and columns of squares of patches."""
    check_at_least(name, edge, 1)
    for size in grid:
        check_at_least("grid", size, 1)
    fits = grid[0] % edge == 0 and grid[1] % edge == 0
    hint = "Change the size of the images or the patches, or the squares"
    require(fits, "grid", f"be a multiple of the squares of {edge} x {edge} patches", tuple(grid), hint)
    return grid[0] // edge, grid[1] // edge


def _enlarge(mask: Tensor, unit: int) -> Tensor:
    """Return a mask of units ``(B, r, c)`` as one of patches ``(B, N)``."""
    return mask.repeat_interleave(unit, 1).repeat_interleave(unit, 2).flatten(1)


def _block_size(grid: tuple[int, int, int], scale: float, aspect: float, time: float) -> tuple[int, int, int]:
    """Return times, rows and columns of a block."""
    area = int(grid[1] * grid[2] * scale)
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    depth = max(1, int(grid[0] * time))
    return depth, max(1, min(height, grid[1])), max(1, min(width, grid[2]))
