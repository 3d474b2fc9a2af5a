"""Crop, resize and flip as two matrix products per image, with exact antialiasing."""

import functools
import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic"]

_TABLE_NUMBERS = 1 << 22  # largest table: 16 MiB of float32 weights


def _cubic_(distance: Tensor, a: float) -> Tensor:
    """Return Keys' cubic convolution kernel at ``distance``, which is overwritten.

    With u = max(2 - |d|, 0) and v = max(1 - |d|, 0) it is a u^2 (1 - u) + v^2 (3 + 4a - 2v), without branches.
    """
    u = distance.abs_().neg_().add_(2).clamp_(min=0)
    v = (u - 1).clamp_(min=0)
    inner = (v * -2).add_(3 + 4 * a).mul_(v).mul_(v)
    return (1 - u).mul_(u).mul_(u).mul_(a).add_(inner)


def _filtered_weights(
    center: Tensor, start: Tensor, length: Tensor, size_in: int, longest: int, interpolation: Interpolation
) -> Tensor:
    """Return Pillow's antialiased weights: the kernel is widened by the factor of downscaling, then normalized.

    Only the taps in the support of the kernel are computed and scattered into a matrix of zeros.
    """
    size_out = center.shape[1]
    reach = 2 if interpolation == "bicubic" else 1
    taps = min(longest, math.ceil(2 * reach * max(1.0, longest / size_out)) + 1)
    stretch = (length / size_out).clamp_(min=1.0)
    first = torch.minimum((center - reach * stretch + 0.5).floor_().clamp_(min=0), (length - taps).clamp_(min=0))
    pixel = first + torch.arange(taps, dtype=center.dtype, device=center.device)
    distance = (pixel + 0.5 - center).div_(stretch)
    kernel = _cubic_(distance, -0.5) if reach == 2 else distance.abs_().neg_().add_(1).clamp_(min=0)
    inside = pixel < length
    kernel.mul_(inside)
    kernel.div_(kernel.sum(-1, keepdim=True))
    # taps beyond the end of a short crop are written, as zeros, to an extra column that is dropped
    column = torch.where(inside, pixel + start, size_in).long()
    weights = center.new_zeros(len(start), size_out, size_in + 1)
    return weights.scatter_(2, column, kernel)[..., :size_in]


def _point_weights(center: Tensor, pixel: Tensor, length: Tensor, interpolation: Interpolation) -> Tensor:
    """Return weights of 1, 2 or 4 taps without antialiasing; taps outside of the crop use its border pixel."""
    if interpolation == "nearest":
        return (center.floor() == pixel).to(center.dtype)
    position = center - 0.5
    if interpolation == "bilinear":
        position = position.clamp(min=0)
    first = position.floor()
    fraction = position - first
    taps = (0, 1) if interpolation == "bilinear" else (-1, 0, 1, 2)
    weights = torch.zeros_like(center * pixel)
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
    longest: int | None = None,
    tabulated: bool = False,
) -> Tensor:
    """Return the matrices that crop and resize one axis of each image.

    Equals ``torch.nn.functional.interpolate(crop, size_out, align_corners=False, antialias=antialias)``, where
    ``"nearest"`` corresponds to its ``"nearest-exact"``.

    Args:
        start: First pixel of each crop, ``(B,)``, whole numbers >= 0.
        length: Length of each crop in pixels, ``(B,)``, whole numbers >= 1.
        size_in: Length of the axis in pixels.
        size_out: Length of the axis in the result.
        interpolation: Kernel; bicubic has a = -0.5 with antialiasing, as in Pillow, and a = -0.75 without.
        antialias: Widen the kernel when downscaling; ignored for ``"nearest"``.
        flip: Images to flip along this axis, bool ``(B,)``.
        longest: Maximum of ``length`` if known on the host; reduces the number of taps.
        tabulated: Use `tabulated_weights` for short axes; on the CPU and in float32 only.

    Returns:
        Weights ``(B, size_out, size_in)``; each row sums to 1.
    """
    if tabulated:
        style: dict[str, Any] = {"interpolation": interpolation, "antialias": antialias}
        found = tabulated_weights(start, length, size_in, size_out, flip=flip, **style)
        if found is not None:
            return found
    start, length = start[:, None, None], length[:, None, None]
    out = torch.arange(size_out, dtype=start.dtype, device=start.device)[None, :, None]
    if flip is not None:
        out = torch.where(flip[:, None, None], size_out - 1 - out, out)
    center = (out + 0.5) * (length / size_out)
    if antialias and interpolation != "nearest":
        return _filtered_weights(center, start, length, size_in, longest or size_in, interpolation)
    pixel = torch.arange(size_in, dtype=start.dtype, device=start.device)[None, None, :] - start
    return _point_weights(center, pixel, length, interpolation)


def tabulated_weights(
    start: Tensor,
    length: Tensor,
    size_in: int,
    size_out: int,
    *,
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
    flip: Tensor | None = None,
) -> Tensor | None:
    """Look up the weights of `resize_weights` in a table of all crops of the axis.

    An axis of CIFAR's images has 528 crops; the lookup takes a thirtieth of the time of the computation.

    Args:
        start: As in `resize_weights`, ``(B,)``, and so are all other arguments.
        length: ``(B,)``.
        size_in: Length of the axis in pixels.
        size_out: Length of the axis in the result.
        interpolation: Kernel.
        antialias: Widen the kernel when downscaling.
        flip: Images to flip, bool ``(B,)``.

    Returns:
        Weights ``(B, size_out, size_in)``, or None if the table would exceed 16 MiB.
    """
    crops = size_in * (size_in + 1) // 2
    if 2 * crops * size_out * size_in > _TABLE_NUMBERS:
        return None
    start, length = start.long(), length.long()
    row = (length - 1) * (2 * size_in + 2 - length) // 2 + start
    if flip is not None:
        row = row.add_(flip, alpha=crops)
    return _table(size_in, size_out, interpolation, antialias).index_select(0, row)


@functools.lru_cache(maxsize=8)
def _table(size_in: int, size_out: int, interpolation: Interpolation, antialias: bool) -> Tensor:
    """Return the weights of all crops of an axis, ordered by flip, length and start."""
    with torch.inference_mode(False), torch.no_grad():
        length = torch.arange(1, size_in + 1, device="cpu")
        lengths = length.repeat_interleave(size_in + 1 - length)
        starts = torch.cat([torch.arange(size_in + 1 - n, device="cpu") for n in length.tolist()])
        both = torch.tensor([False, True], device="cpu").repeat_interleave(len(starts))
        starts, lengths = starts.float().repeat(2), lengths.float().repeat(2)
        style: dict[str, Any] = {"interpolation": interpolation, "antialias": antialias}
        return resize_weights(starts, lengths, size_in, size_out, flip=both, **style).contiguous()


def apply_weights(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resample both axes of each image.

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
