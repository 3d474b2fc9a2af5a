"""The water of the corruption spatter: distances to the edges of drops, as OpenCV's functions give them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LOW, HIGH = 50, 150
"""Thresholds of the edges."""
FARTHEST = 20
"""Distances to the edges are cut here."""
RELIEF = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))


def water(layer: Tensor, correlate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return how much water covers each pixel, ``(B, 1, H, W)``, 1 at most.

    Differs from the reference: distances are exact, OpenCV's are those of a 5 x 5 mask (within 2 %).

    Args:
        layer: Drops, ``(B, 1, H, W)``, 0 between them.
        correlate: Correlation with OpenCV's border.
    """
    drops = (255 * layer).clamp(0, 255).floor()
    box = torch.full((3, 3), 1 / 9, dtype=layer.dtype)
    distance = correlate(distance_to(edges(drops)), box).floor()
    relief = correlate(equalize(distance), torch.tensor(RELIEF, dtype=layer.dtype)).clamp(0, 255)
    cover = drops * correlate(relief, box).round()
    return cover / cover.amax((1, 2, 3), keepdim=True).clamp(min=1.0)


def edges(images: Tensor) -> Tensor:
    """Find edges as OpenCV's Canny with L1 gradients.

    Args:
        images: ``(B, 1, H, W)`` in 0..255, whole numbers.

    Returns:
        Bool mask, ``(B, 1, H, W)``.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]).to(images), torch.tensor([-1.0, 0.0, 1.0]).to(images)
    across = F.conv2d(padded, smooth.outer(slope).view(1, 1, 3, 3))
    down = F.conv2d(padded, slope.outer(smooth).view(1, 1, 3, 3))
    size = across.abs() + down.abs()
    around = F.pad(size, (1, 1, 1, 1))
    height, width = images.shape[-2:]

    def shifted(y: int, x: int) -> Tensor:
        return around[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width]

    level = down.abs() < across.abs() * 0.4142135623730951
    upright = down.abs() > across.abs() * 2.414213562373095
    same = across * down >= 0
    first = torch.where(same, shifted(-1, -1), shifted(-1, 1))
    second = torch.where(same, shifted(1, 1), shifted(1, -1))
    peak = torch.where(level, (size > shifted(0, -1)) & (size >= shifted(0, 1)), (size > first) & (size > second))
    peak = torch.where(upright, (size > shifted(-1, 0)) & (size >= shifted(1, 0)), peak)
    candidates = peak & (size > LOW)
    found = candidates & (size > HIGH)
    while True:  # grow along the candidates
        grown = candidates & (F.max_pool2d(found.to(images.dtype), 3, 1, 1) > 0)
        if torch.equal(grown, found):
            return found
        found = grown


def distance_to(mask: Tensor) -> Tensor:
    """Return the distance of each pixel to the mask ``(B, 1, H, W)``, float64, at most `FARTHEST`."""
    far = float(FARTHEST**2)
    squares = torch.where(mask, 0.0, far).to(torch.float64)
    for dim in (2, 3):
        pad = (FARTHEST, FARTHEST, 0, 0) if dim == 3 else (0, 0, FARTHEST, FARTHEST)
        padded = F.pad(squares, pad, value=far)
        size = mask.shape[dim]
        near = [padded.narrow(dim, FARTHEST + step, size) + step**2 for step in range(-FARTHEST, FARTHEST + 1)]
        squares = torch.stack(near).amin(0)
    return squares.clamp(max=far).sqrt()


def equalize(images: Tensor) -> Tensor:
    """Equalize the histograms of images ``(B, 1, H, W)`` of whole numbers in 0..255, as OpenCV does."""
    rows = images.flatten(1).long()
    counts = torch.zeros(len(rows), 256, dtype=images.dtype, device=images.device)
    counts.scatter_add_(1, rows, torch.ones_like(rows, dtype=images.dtype))
    lowest = rows.amin(1, keepdim=True)
    first = counts.gather(1, lowest)
    rest = rows.shape[1] - first
    levels = ((counts.cumsum(1) - first) * 255 / rest.clamp(min=1.0)).round().clamp(min=0.0)
    return torch.where(rest > 0, levels.gather(1, rows), rows.to(images.dtype)).view_as(images)
