"""Digital corruptions: elastic transform, pixelate, JPEG compression and spatter."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_contrast.augment.corruptions.draws import ImageDraws
from lightning_contrast.augment.corruptions.filters import correlate, gaussian, sample, smooth_field
from lightning_contrast.augment.corruptions.liquid import water

if TYPE_CHECKING:
    from PIL.Image import Image

MUD = (63 / 255, 42 / 255, 20 / 255)
WATER = (175 / 255, 238 / 255, 238 / 255)


def elastic_transform(images: Tensor, setting: tuple[float, float, float], draws: ImageDraws) -> Tensor:
    """Move three points of images ``(B, C, H, W)`` at random by an affine map, then all pixels by a smooth field."""
    strength, sigma, reach = setting
    height, width = images.shape[-2:]
    center = torch.tensor([height, width], dtype=torch.float64, device=images.device).div(2, rounding_mode="floor")
    third = min(height, width) // 3
    signs = torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.float64, device=images.device)
    before = center + third * signs  # (3, 2), as (x, y)
    after = before + draws.uniform(-reach, reach, 3, 2)
    # The affine map takes `before` to `after`; pixels are read at its inverse.
    matrix = torch.linalg.solve(torch.cat([after, torch.ones_like(after[..., :1])], 2), before.expand_as(after))
    y, x = torch.meshgrid(
        *(torch.arange(size, dtype=torch.float64, device=images.device) for size in (height, width)), indexing="ij"
    )
    grid = torch.stack([x, y, torch.ones_like(x)], -1)  # (H, W, 3)
    source = grid.flatten(0, 1) @ matrix  # (B, H W, 2)
    columns, rows = (part.reshape(-1, height, width) for part in source.unbind(-1))
    images = sample(images, rows, columns, repeat_edge=False)
    field = draws.uniform(-1, 1, 2, height, width)
    field = strength * smooth_field(field, sigma, truncate=3.0)
    return sample(images, y + field[:, 1], x + field[:, 0], repeat_edge=True)


def pixelate(images: Tensor, share: float, draws: ImageDraws) -> Tensor:
    """Shrink images ``(B, C, H, W)`` and enlarge them again, by Pillow's box filter on the CPU."""
    from PIL.Image import Resampling

    def shrink(picture: "Image") -> "Image":
        width, height = picture.size
        return picture.resize((int(width * share), int(height * share)), Resampling.BOX).resize(
            (width, height), Resampling.BOX
        )

    return by_pillow(images, shrink)


def jpeg_compression(images: Tensor, quality: int, draws: ImageDraws) -> Tensor:
    """Compress images ``(B, C, H, W)`` by Pillow on the CPU."""
    from PIL import Image

    def compress(picture: "Image.Image") -> "Image.Image":
        memory = io.BytesIO()
        picture.save(memory, "JPEG", quality=quality)
        return Image.open(memory)

    return by_pillow(images, compress)


def by_pillow(images: Tensor, change: "Callable[[Image], Image]") -> Tensor:
    """Apply a function of Pillow to 8-bit images ``(B, 3, H, W)`` in 0..1, one by one."""
    from PIL import Image

    pixels = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(row))) for row in pixels])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).to(images) / 255


def spatter(images: Tensor, setting: tuple[float, float, float, float, float, bool], draws: ImageDraws) -> Tensor:
    """Splash water or mud on images ``(B, 3, H, W)``."""
    mean, std, sigma, threshold, intensity, is_mud = setting
    layer = gaussian(mean + std * draws.normal(1, *images.shape[-2:]), sigma)  # (B, 1, H, W)
    layer = torch.where(layer < threshold, 0.0, layer)
    color = torch.tensor(MUD if is_mud else WATER, dtype=images.dtype, device=images.device).view(3, 1, 1)
    if is_mud:
        cover = gaussian((layer > threshold).to(images.dtype), intensity)
        cover = torch.where(cover < 0.8, 0.0, cover)
        return images * (1 - cover) + color * cover
    return images + intensity * water(layer, correlate) * color
