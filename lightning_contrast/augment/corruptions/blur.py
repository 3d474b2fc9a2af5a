"""Blurs: defocus, glass, motion, zoom and Gaussian."""

import numpy as np
import torch
from torch import Tensor

from lightning_contrast.augment.corruptions.draws import ImageDraws
from lightning_contrast.augment.corruptions.filters import clipped_zoom, correlate, gaussian
from lightning_contrast.augment.corruptions.filters import motion_blur as blur_along


def disk(radius: float, alias_sigma: float) -> Tensor:
    """Return the kernel of the defocus blur, ``(17, 17)`` or ``(2 radius + 1, 2 radius + 1)``.

    Args:
        radius: Radius in pixels.
        alias_sigma: Standard deviation of the Gaussian that smooths its edge.
    """
    small = radius <= 8
    side = 8 if small else int(radius)
    line = torch.arange(-side, side + 1, dtype=torch.float64)
    inside = (line.square().unsqueeze(1) + line.square() <= radius**2).to(torch.float64)
    reach = 1 if small else 2
    weights = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64).square() / (2 * alias_sigma**2))
    weights = weights / weights.sum()
    kernel = (inside / inside.sum()).float().double().view(1, 1, *inside.shape)
    return correlate(kernel, weights.outer(weights))[0, 0].float().double()  # float32 in the reference


def defocus_blur(images: Tensor, setting: tuple[float, float], draws: ImageDraws) -> Tensor:
    """Blur images ``(B, C, H, W)`` with a disk."""
    return correlate(images, disk(*setting))


def gaussian_blur(images: Tensor, sigma: float, draws: ImageDraws) -> Tensor:
    """Blur images ``(B, C, H, W)`` with a Gaussian."""
    return gaussian(images, sigma)


def zoom_blur(images: Tensor, setting: tuple[float, float], draws: ImageDraws) -> Tensor:
    """Average images ``(B, C, H, W)`` with enlarged copies; the first copy has a factor of 1, as in the reference."""
    end, step = setting
    factors = [float(factor) for factor in np.arange(1, end, step)]
    total = torch.zeros_like(images, dtype=torch.float32)  # as in the reference: a last digit decides the truncation
    given = images.float()
    for factor in factors:
        total += clipped_zoom(given.double(), factor).float()
    return (given + total) / (len(factors) + 1)


def motion_blur(images: Tensor, setting: tuple[float, float], draws: ImageDraws) -> Tensor:
    """Blur images ``(B, C, H, W)`` along a random direction within 45 degrees of the horizontal."""
    blurred = blur_along(images, *setting, draws.uniform(-45, 45))
    return (255 * blurred).round() / 255  # ImageMagick gives 8-bit images


def glass_blur(images: Tensor, setting: tuple[float, int, int], draws: ImageDraws) -> Tensor:
    """Blur images ``(B, C, H, W)``, copy pixels from random places nearby, and blur again.

    The reference means to swap pixels, but its assignment of two views copies one, and pixels are visited from the
    lower right: a copied pixel may already be a copy.
    """
    sigma, reach, rounds = setting
    images = (255 * gaussian(images, sigma)).floor() / 255
    for _ in range(rounds):
        index = (
            _copied_from(images.shape[-2], images.shape[-1], reach, draws).unsqueeze(1).expand(-1, images.shape[1], -1)
        )
        images = images.flatten(2).gather(2, index).view_as(images)
    return gaussian(images, sigma)


def _copied_from(height: int, width: int, reach: int, draws: ImageDraws) -> Tensor:
    """Return from which pixel each one gets its value when random pixels nearby are copied, ``(B, H W)``."""
    rows, columns = (torch.arange(reach + 1, edge - reach + 1, device=draws.device) for edge in (height, width))
    rows, columns = rows[rows < height], columns[columns < width]
    own = (rows.unsqueeze(1) * width + columns).flatten()
    offsets = draws.integers(-reach, reach, len(rows), len(columns), 2)  # (B, h, w, 2)
    y, x = rows.view(-1, 1) + offsets[..., 1], columns + offsets[..., 0]
    source = (y * width + x).flatten(1)
    total = height * width
    visited = torch.zeros(total, dtype=torch.bool, device=draws.device)
    visited[own] = True
    # Nodes 0..total - 1 are values before the copies, the others those after them. A source with a larger index was
    # visited earlier, so that its value after the copies is taken.
    jump = torch.arange(total, device=draws.device).repeat(len(source), 2)
    jump[:, own + total] = torch.where(visited[source] & (source > own), source + total, source)
    while True:
        further = jump.gather(1, jump)
        if torch.equal(further, jump):
            return jump[:, total:]
        jump = further
