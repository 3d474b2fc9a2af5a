"""Crop, resize and flip as two matrix products per image: no loop over images, no gather, exact antialiasing."""

import functools
import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic"]

_TABLE_NUMBERS = 1 << 22  # weights that a table may hold: 16 MiB


def _cubic_(distance: Tensor, a: float) -> Tensor:
    """Return Keys' cubic kernel at ``distance``, which is overwritten; zero from 2 on.

    With u = max(2 - |d|, 0) and v = max(1 - |d|, 0) it is a u^2 (1 - u) + v^2 (3 + 4a - 2v): no branches.
    """
    u = distance.abs_().neg_().add_(2).clamp_(min=0)
    v = (u - 1).clamp_(min=0)
    inner = (v * -2).add_(3 + 4 * a).mul_(v).mul_(v)
    return (1 - u).mul_(u).mul_(u).mul_(a).add_(inner)


def _filtered_weights(
    centre: Tensor, start: Tensor, length: Tensor, size_in: int, longest: int, interpolation: Interpolation
) -> Tensor:
    """Return Pillow's antialiased weights: the kernel is stretched by the scale where it shrinks, then normalised.

    Only the taps under the kernel are computed, then written into a matrix of zeros.
    """
    size_out = centre.shape[1]
    reach = 2 if interpolation == "bicubic" else 1
    taps = min(longest, math.ceil(2 * reach * max(1.0, longest / size_out)) + 1)
    stretch = (length / size_out).clamp_(min=1.0)
    first = torch.minimum((centre - reach * stretch + 0.5).floor_().clamp_(min=0), (length - taps).clamp_(min=0))
    pixel = first + torch.arange(taps, dtype=centre.dtype, device=centre.device)
    distance = (pixel + 0.5 - centre).div_(stretch)
    kernel = _cubic_(distance, -0.5) if reach == 2 else distance.abs_().neg_().add_(1).clamp_(min=0)
    inside = pixel < length
    kernel.mul_(inside)
    kernel.div_(kernel.sum(-1, keepdim=True))
    # what lies beyond a crop that is shorter than the taps goes, as zeros, into a column that is cut off
    column = torch.where(inside, pixel + start, size_in).long()
    weights = centre.new_zeros(len(start), size_out, size_in + 1)
    return weights.scatter_(2, column, kernel)[..., :size_in]


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
    longest: int | None = None,
    tabulated: bool = False,
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
        longest: The largest of ``length`` where it is known on the host: saves work.
        tabulated: Look small axes up in a table, see `tabulated_weights`; on the CPU and in float32 only.

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
    centre = (out + 0.5) * (length / size_out)
    if antialias and interpolation != "nearest":
        return _filtered_weights(centre, start, length, size_in, longest or size_in, interpolation)
    pixel = torch.arange(size_in, dtype=start.dtype, device=start.device)[None, None, :] - start
    return _point_weights(centre, pixel, length, interpolation)


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
    """Return what `resize_weights` returns for these arguments, looked up in a table of all crops of the axis.

    The images of CIFAR have 528 crops of an axis: to look up the weights takes a thirtieth of computing them. None
    where the table would be large.
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
    """Return the weights of every crop of an axis, by length and then by start, as they are and then mirrored."""
    with torch.inference_mode(False), torch.no_grad():
        length = torch.arange(1, size_in + 1, device="cpu")
        lengths = length.repeat_interleave(size_in + 1 - length)
        starts = torch.cat([torch.arange(size_in + 1 - n, device="cpu") for n in length.tolist()])
        both = torch.tensor([False, True], device="cpu").repeat_interleave(len(starts))
        starts, lengths = starts.float().repeat(2), lengths.float().repeat(2)
        style: dict[str, Any] = {"interpolation": interpolation, "antialias": antialias}
        return resize_weights(starts, lengths, size_in, size_out, flip=both, **style).contiguous()


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
