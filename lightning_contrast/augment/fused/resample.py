"""Crop, resize and flip as two matrix products per image: no loop over images, no gather, exact antialiasing."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic"]


def _cubic_(distance: Tensor, a: float) -> Tensor:
    """Return Keys' cubic kernel at ``distance``, which is overwritten; zero from 2 on.

    With u = max(2 - |d|, 0) and v = max(1 - |d|, 0) it is a u^2 (1 - u) + v^2 (3 + 4a - 2v): no branches.
    """
    u = distance.abs_().neg_().add_(2).clamp_(min=0)
    v = (u - 1).clamp_(min=0)
    inner = (v * -2).add_(3 + 4 * a).mul_(v).mul_(v)
    return (1 - u).mul_(u).mul_(u).mul_(a).add_(inner)


def _filtered_weights(centre: Tensor, pixel: Tensor, scale: Tensor, inside: Tensor, cubic: bool) -> Tensor:
    """Return Pillow's antialiased weights: the kernel is stretched by the scale where it shrinks, then normalised."""
    stretch = scale.clamp(min=1.0)
    far = torch.full_like(pixel, torch.finfo(pixel.dtype).max / 4)  # pixels beyond the crop get no weight
    distance = torch.where(inside, (pixel + 0.5) / stretch, far) - centre / stretch
    kernel = _cubic_(distance.clamp_(-2, 2), -0.5) if cubic else distance.abs_().neg_().add_(1).clamp_(min=0)
    return kernel.div_(kernel.sum(-1, keepdim=True))


def _point_weights(centre: Tensor, pixel: Tensor, length: Tensor, interpolation: Interpolation) -> Tensor:
    """Return the weights of 1, 2 or 4 taps without antialiasing; taps beyond the crop fall on its border pixel."""
    if interpolation == "nearest":
        return (centre.floor() == pixel).to(centre.dtype)
    position = centre - 0.5
    if interpolation == "bilinear":
        position = position.clamp(min=0)
    first = position.floor()
    fraction = position - first
    taps = (0, 1) if interpolation == "bilinear" else (-1, 0, 1, 2)
    weights = torch.zeros_like(centre * pixel)
    for tap in taps:
        value = (1 - (fraction - tap).abs()) if interpolation == "bilinear" else _cubic_(fraction - tap, -0.75)
        index = torch.minimum((first + tap).clamp(min=0), length - 1)
        weights += (index == pixel) * value
    return weights


def resize_weights(
    start: Tensor,
    length: Tensor,
    size_in: int,
    size_out: int,
    *,
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
    flip: Tensor | None = None,
) -> Tensor:
    """Return for each image the matrix that crops and resizes one of its axes.

    Equals ``torch.nn.functional.interpolate(crop, size_out, align_corners=False, antialias=antialias)``, with
    ``"nearest"`` in the sense of its ``"nearest-exact"``.

    Args:
        start: First pixel of the crop, ``(B,)``, whole numbers from 0 on.
        length: Pixels of the crop, ``(B,)``, whole numbers from 1 on.
        size_in: Pixels of the axis.
        size_out: Pixels of the axis in the result.
        interpolation: Kernel; antialiased bicubic uses a = -0.5 as Pillow does, point-sampled bicubic a = -0.75.
        antialias: Widen the kernel where the crop shrinks; has no meaning for ``"nearest"``.
        flip: Images to mirror along this axis, bool ``(B,)``.

    Returns:
        Weights ``(B, size_out, size_in)``; each row sums to 1.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size_out
    out = torch.arange(size_out, dtype=start.dtype, device=start.device)[None, :, None]
    if flip is not None:
        out = torch.where(flip[:, None, None], size_out - 1 - out, out)
    centre = (out + 0.5) * scale
    pixel = torch.arange(size_in, dtype=start.dtype, device=start.device)[None, None, :] - start
    if antialias and interpolation != "nearest":
        inside = (pixel >= 0) & (pixel < length)
        return _filtered_weights(centre, pixel, scale, inside, interpolation == "bicubic")
    return _point_weights(centre, pixel, length, interpolation)


def apply_weights(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resample images along both axes.

    Args:
        images: ``(B, C, H, W)``, float.
        rows: Weights of the vertical axis, ``(B, h, H)``.
        columns: Weights of the horizontal axis, ``(B, w, W)``.

    Returns:
        ``(B, C, h, w)``.
    """
    batch, channels, height, width = images.shape
    wide = torch.bmm(images.reshape(batch, channels * height, width), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], wide.view(batch, channels, height, -1))
