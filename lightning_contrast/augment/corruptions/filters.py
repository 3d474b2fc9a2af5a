"""Filters and sampling with the borders of OpenCV, SciPy and scikit-image, in float64."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def reflected(index: Tensor, size: int, *, repeat_edge: bool) -> Tensor:
    """Return indices reflected into 0..size - 1.

    Args:
        index: Integers of any shape ``(...,)``.
        size: Number of rows.
        repeat_edge: ``d c b a | a b c d`` as in SciPy's "reflect"; otherwise ``d c b | a b c d``, OpenCV's 101.
    """
    if size == 1:
        return torch.zeros_like(index)
    period = 2 * size if repeat_edge else 2 * size - 2
    index = index.remainder(period)
    mirror = period - 1 - index if repeat_edge else period - index
    return torch.where(index < size, index, mirror)


def gaussian_weights(sigma: float, truncate: float) -> Tensor:
    """Return the weights of SciPy's ``gaussian_filter1d``, ``(2 radius + 1,)``, float64."""
    radius = int(truncate * sigma + 0.5)
    weights = np.exp(-0.5 / sigma**2 * np.arange(-radius, radius + 1) ** 2)
    return torch.from_numpy(weights / weights.sum())


def gaussian(images: Tensor, sigma: float, *, truncate: float = 4.0) -> Tensor:
    """Blur images ``(..., H, W)`` with a Gaussian; edge values are extended, SciPy's mode "nearest".

    Sums are in the order of SciPy, because a last digit decides how a value is truncated to 8 bits.

    Args:
        images: float64.
        sigma: Standard deviation in pixels; at 0 the images do not change.
        truncate: Radius in standard deviations.
    """
    if sigma <= 1e-15:
        return images
    weights = gaussian_weights(sigma, truncate).tolist()
    radius = len(weights) // 2
    for dim in (-2, -1):
        size = images.shape[dim]
        index = torch.arange(-radius, size + radius, device=images.device).clamp(0, size - 1)
        padded = images.index_select(dim, index)
        images = padded.narrow(dim, radius, size) * weights[radius]
        for step in range(radius):
            pair = padded.narrow(dim, step, size) + padded.narrow(dim, 2 * radius - step, size)
            images = images + pair * weights[step]
    return images


def smooth_field(fields: Tensor, sigma: float, *, truncate: float) -> Tensor:
    """Blur fields ``(..., H, W)`` with a Gaussian that may be wider than them; edges are reflected, SciPy's "reflect".

    Args:
        fields: float64.
        sigma: Standard deviation in pixels; at 0 the fields do not change.
        truncate: Radius in standard deviations.
    """
    if sigma <= 1e-15:
        return fields
    weights = gaussian_weights(sigma, truncate)
    offsets = torch.arange(len(weights)) - len(weights) // 2
    rows, columns = (
        torch.zeros(size, size, dtype=torch.float64)
        .scatter_add_(
            1,
            reflected(torch.arange(size).unsqueeze(1) + offsets, size, repeat_edge=True),
            weights.expand(size, -1),
        )
        .to(fields.device)
        for size in fields.shape[-2:]
    )
    return rows @ fields @ columns.T


def correlate(images: Tensor, kernel: Tensor) -> Tensor:
    """Correlate each channel with a kernel, with OpenCV's default border (reflection without the edge).

    Args:
        images: ``(B, C, H, W)``, float64.
        kernel: ``(h, w)``, odd.
    """
    height, width = kernel.shape
    padded = F.pad(images, (width // 2, width // 2, height // 2, height // 2), mode="reflect")
    weight = kernel.to(images).expand(images.shape[1], 1, -1, -1)
    return F.conv2d(padded, weight, groups=images.shape[1])


def sample(images: Tensor, rows: Tensor, columns: Tensor, *, repeat_edge: bool) -> Tensor:
    """Interpolate images linearly at positions in pixels; positions outside are reflected.

    Args:
        images: ``(B, C, H, W)``, float64.
        rows: Row of each output pixel, ``(B, h, w)``.
        columns: Column of each output pixel, ``(B, h, w)``.
        repeat_edge: As in `reflected`.

    Returns:
        ``(B, C, h, w)``.
    """
    height, width = images.shape[-2:]
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top).unsqueeze(1), (columns - left).unsqueeze(1)
    flat = images.flatten(2)
    found = torch.zeros((), dtype=images.dtype, device=images.device)
    for i, weight_i in ((0, 1 - down), (1, down)):
        y = reflected(top.long() + i, height, repeat_edge=repeat_edge)
        for j, weight_j in ((0, 1 - right), (1, right)):
            x = reflected(left.long() + j, width, repeat_edge=repeat_edge)
            index = (y * width + x).flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)
            found = found + weight_i * weight_j * flat.gather(2, index).view(*images.shape[:2], *rows.shape[1:])
    return found


def clipped_zoom(images: Tensor, factor: float) -> Tensor:
    """Enlarge the center of square images ``(B, C, H, W)`` linearly, as SciPy's ``zoom`` does, to the same size."""
    size = images.shape[-2:]
    inner = [math.ceil(edge / factor) for edge in size]
    top, left = ((edge - part) // 2 for edge, part in zip(size, inner, strict=True))
    center = images[..., top : top + inner[0], left : left + inner[1]]
    larger = [round(part * factor) for part in inner]
    zoomed = F.interpolate(center, larger, mode="bilinear", align_corners=True)
    top, left = ((part - edge) // 2 for edge, part in zip(size, larger, strict=True))
    return zoomed[..., top : top + size[0], left : left + size[1]]


def motion_blur(images: Tensor, radius: float, sigma: float, angles: Tensor) -> Tensor:
    """Blur each image in one direction, as ImageMagick's motion blur: a one-sided Gaussian, edges extended.

    Args:
        images: ``(B, C, H, W)``, float64.
        radius: Half the number of pixels of the kernel.
        sigma: Standard deviation in pixels.
        angles: Direction of each image in degrees, ``(B,)``.
    """
    steps = torch.arange(2 * math.ceil(radius) + 1, dtype=torch.float64, device=images.device)
    weights = torch.exp(-steps.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    angles = torch.deg2rad(angles).unsqueeze(1)
    across, down = torch.ceil(steps * angles.cos() - 0.5).long(), torch.ceil(steps * angles.sin() - 0.5).long()
    height, width = images.shape[-2:]
    y, x = (torch.arange(size, device=images.device) for size in (height, width))
    flat, blurred = images.flatten(2), torch.zeros_like(images)
    for step, weight in enumerate(weights):
        rows = (y + down[:, step : step + 1]).clamp(0, height - 1)  # (B, H)
        columns = (x + across[:, step : step + 1]).clamp(0, width - 1)  # (B, W)
        index = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).flatten(1).unsqueeze(1)
        blurred += weight * flat.gather(2, index.expand(-1, images.shape[1], -1)).view_as(images)
    return blurred
