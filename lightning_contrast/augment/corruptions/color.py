"""Brightness, contrast and saturation."""

import torch
from torch import Tensor

from lightning_contrast.augment.corruptions.draws import ImageDraws


def to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue, saturation and value of images ``(B, 3, H, W)``, each ``(B, H, W)`` in 0..1."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    spread = value - low
    divisor = torch.where(spread == 0, 1.0, spread)
    hue = torch.where(red == value, (green - blue) / divisor, 0.0)
    hue = torch.where(green == value, 2 + (blue - red) / divisor, hue)
    hue = torch.where(blue == value, 4 + (red - green) / divisor, hue)
    hue = torch.where(spread == 0, 0.0, (hue / 6).remainder(1))
    saturation = torch.where(spread == 0, 0.0, spread / torch.where(value == 0, 1.0, value))
    return hue, saturation, value


def from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return images ``(B, 3, H, W)`` of hue, saturation and value, each ``(B, H, W)`` in 0..1."""
    sector = (hue * 6).floor()
    part = hue * 6 - sector
    p, q, t = value * (1 - saturation), value * (1 - part * saturation), value * (1 - (1 - part) * saturation)
    choices = ((value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value), (value, p, q))
    table = torch.stack([torch.stack(channels, 1) for channels in choices])  # (6, B, 3, H, W)
    index = sector.long().remainder(6)[None, :, None].expand(1, *table.shape[1:])
    return table.gather(0, index)[0]


def brightness(images: Tensor, shift: float, draws: ImageDraws) -> Tensor:
    """Add to the value of images ``(B, 3, H, W)`` in HSV."""
    hue, saturation, value = to_hsv(images)
    return from_hsv(hue, saturation, (value + shift).clamp(0, 1))


def saturate(images: Tensor, setting: tuple[float, float], draws: ImageDraws) -> Tensor:
    """Multiply the saturation of images ``(B, 3, H, W)`` in HSV, and add to it."""
    hue, saturation, value = to_hsv(images)
    return from_hsv(hue, (saturation * setting[0] + setting[1]).clamp(0, 1), value)


def contrast(images: Tensor, factor: float, draws: ImageDraws) -> Tensor:
    """Move images ``(B, C, H, W)`` towards their mean color."""
    means = images.mean((2, 3), keepdim=True)
    return (images - means) * factor + means
