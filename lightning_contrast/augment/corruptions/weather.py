"""Weather: snow, frost and fog."""

import torch
from torch import Tensor

from lightning_contrast.augment.corruptions.draws import ImageDraws
from lightning_contrast.augment.corruptions.filters import clipped_zoom, motion_blur

LUMA = (0.299, 0.587, 0.114)


def plasma(draws: ImageDraws, size: int, decay: float) -> Tensor:
    """Return plasma fractals by the diamond-square algorithm, ``(B, size, size)`` in 0..1.

    As in the reference, which multiplies a draw within the amplitude by the amplitude, and takes the upper corners of
    the vertical diamonds from one row.

    Args:
        draws: Random draws of the batch.
        size: Edge, a power of two.
        decay: Divisor of the amplitude per halving of the step.
    """
    grid = torch.zeros(len(draws.generators), size, size, dtype=torch.float64, device=draws.device)
    step, amplitude = size, 100.0

    def displaced(total: Tensor) -> Tensor:
        return total / 4 + amplitude * draws.uniform(-amplitude, amplitude, *total.shape[1:])

    while step >= 2:
        half = step // 2
        corners = grid[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        grid[:, half::step, half::step] = displaced(pairs + pairs.roll(-1, 2))
        centers = grid[:, half::step, half::step]
        across = corners + corners.roll(-1, 2)
        grid[:, ::step, half::step] = displaced(centers + centers.roll(1, 1) + across)
        grid[:, half::step, ::step] = displaced(centers + centers.roll(1, 2) + across)
        step, amplitude = half, amplitude / decay
    grid -= grid.amin((1, 2), keepdim=True)
    return grid / grid.amax((1, 2), keepdim=True)


def _plasma_of(images: Tensor, decay: float, draws: ImageDraws) -> Tensor:
    """Return plasma fractals of the size of images ``(B, C, H, W)``, ``(B, 1, H, W)``."""
    height, width = images.shape[-2:]
    size = 1 << (max(height, width) - 1).bit_length()
    return plasma(draws, size, decay)[:, None, :height, :width]


def fog(images: Tensor, setting: tuple[float, float], draws: ImageDraws) -> Tensor:
    """Add a plasma fractal to images ``(B, C, H, W)`` and scale back to their brightest value."""
    amount, decay = setting
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + amount * _plasma_of(images, decay, draws)) * brightest / (brightest + amount)


def add_frost(
    images: Tensor, setting: tuple[float, float], draws: ImageDraws, pictures: Tensor | None = None
) -> Tensor:
    """Mix images ``(B, 3, H, W)`` with frost.

    The benchmark cuts it out of six photographs (of which it uses five), which are not part of this package: without
    ``pictures``, the frost is a texture of bright ridges, and the accuracies are not those of the benchmark.

    Args:
        images: In 0..1.
        setting: Weights of image and frost.
        draws: Random draws of the batch.
        pictures: The benchmark's pictures, uint8 ``(n, 3, h, w)``, at least as large as the images.
    """
    weight, frost_weight = setting
    if pictures is None:
        ridges = 1 - (2 * _plasma_of(images, 1.7, draws) - 1).abs()
        crystals = 1 - (2 * _plasma_of(images, 1.3, draws) - 1).abs()
        texture = 0.25 + 0.75 * (0.5 * ridges.square() + 0.5 * crystals.pow(4))
        tint = torch.tensor((0.9, 0.97, 1.0), dtype=images.dtype, device=images.device).view(3, 1, 1)
        return weight * images + frost_weight * (texture * tint)
    height, width = images.shape[-2:]
    cut = []
    for row in draws.uniform(0, 1, 3).tolist():
        picture = pictures[int(row[0] * len(pictures))]
        top, left = (
            int(share * (edge - part + 1))
            for share, edge, part in zip(row[1:], picture.shape[1:], (height, width), strict=True)
        )
        cut.append(picture[:, top : top + height, left : left + width])
    return weight * images + frost_weight * torch.stack(cut).to(images) / 255


def snow(images: Tensor, setting: tuple[float, ...], draws: ImageDraws) -> Tensor:
    """Whiten images ``(B, 3, H, W)`` and add two layers of moving flakes."""
    mean, std, zoom, threshold, radius, sigma, mix = setting
    layer = clipped_zoom(mean + std * draws.normal(1, *images.shape[-2:]), zoom)
    layer = torch.where(layer < threshold, 0.0, layer)
    layer = (255 * layer.clamp(0, 1)).floor() / 255
    layer = (255 * motion_blur(layer, radius, sigma, draws.uniform(-135, -45))).round() / 255
    luma = torch.tensor(LUMA, dtype=images.dtype, device=images.device).view(3, 1, 1)
    gray = (images * luma).sum(1, keepdim=True)
    whitened = mix * images + (1 - mix) * torch.maximum(images, gray * 1.5 + 0.5)
    return whitened + layer + layer.rot90(2, (2, 3))
