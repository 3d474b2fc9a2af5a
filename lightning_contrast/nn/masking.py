"""Mask samplers of iBOT and DINOv2.

Masks are drawn on the host, without device synchronization, with a seed from torch's CPU generator, so `StepSeed` makes
them a function of the step.
"""

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_contrast._checks import (
    check_at_least,
    check_choice,
    check_numbers,
    check_probability,
    check_range,
    require,
)
from lightning_contrast.nn.vision_transformers import MaskedViT
from lightning_contrast.seeding import send

ATTEMPTS = 10  # to place a block, before an image keeps the blocks it has
_LOWEST_ASPECT = 0.3  # of a block, height by width; the highest is its inverse
_DINOV2_SMALLEST = 4  # patches of a block


class MaskedPatches(NamedTuple):
    """Masks on the device of the images, and the positions of the masked patches.

    Attributes:
        mask: ``(images, N)`` bool.
        rows: The masked patches among all ``images * N``, ``(M,)``, ascending.
        images: The image of each, ``(M,)``.
    """

    mask: Tensor
    rows: Tensor
    images: Tensor


def masked_patches(mask: Tensor, device: torch.device) -> MaskedPatches:
    """Return masks and the positions of masked patches on a device, computed on the host without synchronization.

    Args:
        mask: Masks ``(images, N)`` bool on the CPU.
        device: Target device.
    """
    rows = mask.flatten().nonzero().squeeze(1)
    return MaskedPatches(*(send(part, device) for part in (mask, rows, rows // mask.shape[1])))


class MaskSplit(NamedTuple):
    """Visible and hidden patches of each image, on the device of the images.

    Attributes:
        mask: ``(images, N)`` bool, True where hidden.
        visible: Their positions among the N patches, ``(images, K)`` int64, ascending.
        hidden: The same of the hidden ones, ``(images, M)`` int64.
    """

    mask: Tensor
    visible: Tensor
    hidden: Tensor


def split_masks(mask: Tensor, device: torch.device, *, cut: bool = False) -> MaskSplit:
    """Return which patches are visible and hidden, computed on the host without synchronization.

    Args:
        mask: Masks ``(images, N)`` bool on the CPU.
        device: Target device.
        cut: Accept masks with different numbers of hidden patches: the visible and the hidden ones of all images are
            cut to the smallest number, from the end. The mask itself stays as it is.

    Raises:
        ValueError: If the numbers differ and ``cut`` is False.
    """
    hidden, patches = mask.sum(1), mask.shape[1]
    least, most = int(hidden.min()), int(hidden.max())
    hint = "Use a sampler with a fixed number, such as `random_masks`"
    require(cut or least == most, "mask", "hide as many patches in every image", (least, most), hint)
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)  # visible ones first, each in raster order
    rest = torch.arange(least, device="cpu") + (patches - hidden).unsqueeze(1)
    parts = (mask, order[:, : patches - most].contiguous(), order.gather(1, rest))
    return MaskSplit(*(send(part, device) for part in parts))


def ibot_masks(
    images: int,
    grid: tuple[int, int],
    *,
    ratios: Sequence[float] = (0.0, 0.3),
    spreads: Sequence[float] = (0.0, 0.2),
    shape: str = "block",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw iBOT's masks: for each image one of the ratios, and blocks until that share of its patches is masked.

    Source: https://github.com/bytedance/ibot (``loader.py``), which has the blocks from BEiT
    (https://arxiv.org/abs/2106.08254). An image may end with fewer patches than its share, where no further block fits.

    Args:
        images: Number of masks, >= 1.
        grid: Rows and columns of patches.
        ratios: Shares of masked patches, each in 0..1; each image draws one of them. The published runs of ViTs leave
            half of the images whole.
        spreads: For each ratio, how far the share is drawn around it, evenly; 0 for exactly the ratio.
        shape: ``"block"``, or ``"random"`` for patches anywhere, whose number is then exact.
        generator: Where the seed is drawn from; None is torch's global CPU generator.

    Returns:
        Masks ``(images, rows * columns)`` bool on the CPU, row by row, True where masked.

    Raises:
        ValueError: If a ratio and its spread leave 0..1, or the numbers of ratios and spreads differ.
        TypeError: If a number that counts is not whole.
    """
    check_mask_ratios(ratios, spreads, shape)
    rng, (rows, columns) = seeded_random(images, grid, generator), grid
    drawn = []
    for _ in range(images):
        choices = [rng.uniform(r - s, r + s) if s > 0 else r for r, s in zip(ratios, spreads, strict=True)]
        target = rng.choice(choices) * rows * columns
        if shape == "random":
            drawn.append(sum(1 << patch for patch in rng.sample(range(rows * columns), int(target))))
        else:
            drawn.append(draw_blocks(rng, rows, columns, target, (min(rows, columns) // 3) ** 2, rows * columns))
    return unpack_masks(drawn, rows * columns)


def dinov2_masks(
    images: int,
    grid: tuple[int, int],
    *,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw DINOv2's masks: a fixed number of images is masked, with shares spread evenly over a range.

    Source: https://github.com/facebookresearch/dinov2 (``data/collate.py``, ``data/masking.py``). The range is cut into
    as many pieces as there are masked images; each draws its share from a different piece, then the masks are
    shuffled over the images.

    Args:
        images: Number of masks, >= 1: all global views of a batch.
        grid: Rows and columns of patches.
        probability: Share of the images that are masked, in 0..1, rounded down to whole images.
        ratio: Smallest and largest share of masked patches, in 0..1.
        generator: Where the seed is drawn from; None is torch's global CPU generator.

    Returns:
        Masks ``(images, rows * columns)`` bool on the CPU, row by row, True where masked.

    Raises:
        ValueError: If a share leaves 0..1 or the range is out of order.
        TypeError: If a number that counts is not whole.
    """
    check_probability("probability", probability)
    check_range("ratio", ratio, 0, 1)
    rng, (rows, columns) = seeded_random(images, grid, generator), grid
    masked, patches = int(images * probability), rows * columns
    edges = np.linspace(*ratio, masked + 1).tolist()
    drawn = [0] * (images - masked)
    for low, high in pairwise(edges):
        target = int(patches * rng.uniform(low, high))
        drawn.append(draw_blocks(rng, rows, columns, target, _DINOV2_SMALLEST, 0.5 * patches))
    rng.shuffle(drawn)
    return unpack_masks(drawn, patches)


def check_mask_ratios(ratios: Sequence[float], spreads: Sequence[float], shape: str = "block") -> None:
    """Check the arguments of `ibot_masks`.

    Args:
        ratios: See there.
        spreads: See there.
        shape: See there.

    Raises:
        ValueError: If a ratio and its spread leave 0..1, there is not one spread for each ratio, or no such shape.
        TypeError: If one of them is not a sequence of numbers.
    """
    ratios = check_numbers("mask_ratios", ratios, "Give (0.0, 0.3)")
    spreads = check_numbers("mask_spreads", spreads, "Give (0.0, 0.2)")
    require(len(ratios) > 0, "mask_ratios", "hold at least one ratio", ratios, "Give (0.0, 0.3)")
    hint = "Give one spread for each ratio, 0 for none"
    require(len(ratios) == len(spreads), "mask_spreads", f"have {len(ratios)} numbers", spreads, hint)
    for ratio, spread in zip(ratios, spreads, strict=True):
        inside = 0 <= ratio - spread <= ratio <= ratio + spread <= 1
        require(inside, "mask_ratios", "stay in [0, 1] with their spreads", (ratio, spread), "Lower the spread")
    check_choice("mask_shape", shape, ("block", "random"))


def seeded_random(images: int, grid: tuple[int, int], generator: torch.Generator | None) -> random.Random:
    """Check the sizes and return a generator of Python's, whose numbers are fast to draw one by one.

    Args:
        images: Number of masks.
        grid: Rows and columns of patches.
        generator: Where the seed is drawn from; None is torch's global CPU generator.
    """
    for name, value in (("images", images), ("grid", grid[0]), ("grid", grid[1])):
        check_at_least(name, value, 1)
    return random.Random(torch.randint(2**62, (1,), generator=generator, device="cpu").numpy().item())  # noqa: S311  (no secret)


def draw_blocks(rng: random.Random, rows: int, columns: int, target: float, smallest: float, largest: float) -> int:
    """Return a mask as the bits of a number: blocks until ``target`` patches are masked or none fits any more.

    Args:
        rng: Source of the draws.
        rows: Rows of patches.
        columns: Columns of patches.
        target: Patches to mask; a block that would pass it is not taken.
        smallest: Area from which the size of a block is drawn.
        largest: Most patches that a block may add.
    """
    mask = 0
    while (remaining := target - mask.bit_count()) > 0:
        added = _block(rng, rows, columns, mask, smallest, min(remaining, largest))
        if not added:
            break
        mask |= added
    return mask


def _block(rng: random.Random, rows: int, columns: int, mask: int, smallest: float, most: float) -> int:
    """Return the bits of a block that adds 1 to ``most`` patches to the mask, 0 where none was found."""
    limit = -math.log(_LOWEST_ASPECT)
    for _ in range(ATTEMPTS):
        area, aspect = rng.uniform(smallest, most), math.exp(rng.uniform(-limit, limit))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        line = ((1 << width) - 1) << left
        block = sum(line << (row * columns) for row in range(top, top + height))
        if 0 < (block & ~mask).bit_count() <= most:
            return block
    return 0


def unpack_masks(masks: Sequence[int], patches: int) -> Tensor:
    """Return masks ``(images, patches)`` bool of numbers whose bit i represents patch i.

    Args:
        masks: One number per image.
        patches: Number of patches.
    """
    size = -(-patches // 8)
    packed = np.frombuffer(b"".join(mask.to_bytes(size, "little") for mask in masks), np.uint8)
    bits = np.unpackbits(packed.reshape(len(masks), size), axis=1, count=patches, bitorder="little")
    return torch.from_numpy(bits).bool()


def join_globals(views: Sequence[Tensor]) -> Tensor:
    """Return the two global views of a batch as one, (2B, C, h, w), view by view.

    Args:
        views: The views, global ones first, each (B, C, h, w).

    Raises:
        ValueError: If the global views differ in size.
    """
    sizes = [tuple(view.shape[-2:]) for view in views[:2]]
    hint = "Give a policy whose global views have one size; local views may have others"
    require(sizes[0] == sizes[1], "views", "begin with two global views of one size", sizes, hint)
    return torch.cat([views[0], views[1]])


def draw_masks(sampler: Callable[..., Tensor], backbone: MaskedViT, images: Tensor, **settings: Any) -> MaskedPatches:
    """Draw a mask for each image.

    Args:
        sampler: `ibot_masks` or `dinov2_masks`.
        backbone: What cuts the images into patches.
        images: Images (B, C, h, w).
        settings: Further arguments of the sampler.
    """
    return masked_patches(sampler(len(images), backbone.grid_size(images), **settings), images.device)


def draw_split(sampler: Callable[..., Tensor], backbone: MaskedViT, images: Tensor) -> MaskSplit:
    """Draw a mask for each image, and split its patches into visible and hidden ones.

    Args:
        sampler: A sampler that hides as many patches in every image, such as `random_masks`.
        backbone: What cuts the images into patches.
        images: Images (B, C, h, w).
    """
    return split_masks(sampler(len(images), backbone.grid_size(images)), images.device)


def gather(patches: Tensor, index: Tensor) -> Tensor:
    """Return the patches at an index into those of all images.

    Args:
        patches: Patches of all images, ``(B, N, F)``.
        index: Positions among all B N patches, ``(M,)``.

    Returns:
        The patches, ``(M, F)``.
    """
    return patches.flatten(0, 1).index_select(0, index)
