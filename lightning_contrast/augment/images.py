"""Validation and conversion of image batches."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.contracts import check_images

PixelRange: TypeAlias = tuple[float, float] | None
"""The values of images that become 0 and 1; None for uint8 in 0..255 and float in 0..1."""

Size: TypeAlias = int | tuple[int, int]
"""Edge of a square in pixels, or height and width."""

INTERPOLATIONS = ("bilinear", "bicubic")
"""Resampling of images for evaluation."""


def check_size(size: object, name: str = "size") -> tuple[int, int]:
    """Return height and width of a `Size`, after checking that both are whole numbers >= 1."""
    if isinstance(size, int):
        check_at_least(name, size, 1)
        return size, size
    whole = isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(edge, int) for edge in size)
    if not isinstance(size, tuple | list) or not whole:
        fail(name, "be a whole number of pixels, or (height, width)", size, "Give for example 224 or (224, 448)")
    for edge in size:
        check_at_least(name, edge, 1)
    return size[0], size[1]


def check_policy_input(images: object, channels: int, scale: PixelRange = None) -> Tensor:
    """Return ``images`` if they are a batch that a policy accepts.

    Args:
        images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1. Values are not read.
        channels: Number of channels that the policy expects.
        scale: The values that become 0 and 1, of images of any integer or float type.

    Returns:
        The images ``(B, C, H, W)``, uint8 or float32; with ``scale`` float32 in 0..1.

    Raises:
        TypeError: If it is not a tensor, or its dtype is neither uint8 nor floating.
        ValueError: If its shape is not ``(B, channels, H, W)`` or it has no elements, or integers of its type cannot
            have the values of ``scale``.
    """
    if not isinstance(images, Tensor):
        fail("images", "be a tensor (B, C, H, W)", type(images).__name__, "Stack the images of the batch", TypeError)
    integers = not images.is_floating_point() and images.dtype not in (torch.uint8, torch.bool)
    if scale is None and integers:
        hint = "Give `make_policy` or a policy of `augment.domains` a `scale=(low, high)`, or convert them"
        fail("images", "be uint8 in 0..255 or float in 0..1 without `scale`", str(images.dtype), hint, TypeError)
    if scale is not None and not images.is_floating_point() and images.dtype != torch.bool:
        limits, hint = torch.iinfo(images.dtype), "Give the range of the stored values, or convert the images first"
        held = limits.min <= scale[0] and scale[1] <= limits.max
        require(held, "scale", f"lie in the range of the images, which are {images.dtype}", tuple(scale), hint)
    images = check_images(images.float() if integers else images, values=False, evaluating=False)
    hint = f"Make the policy with `channels={images.shape[1]}`, or give images with {channels} channels"
    require(images.shape[1] == channels, "images", f"have {channels} channels", tuple(images.shape), hint)
    hint = "Skip empty batches"
    require(images.numel() > 0, "images", "hold at least one image of at least one pixel", tuple(images.shape), hint)
    return images if scale is None else rescale(images, scale)


def rescale(images: Tensor, scale: tuple[float, float]) -> Tensor:
    """Return images ``(B, C, H, W)`` as float32: ``scale`` becomes 0..1, and values outside of it are clipped."""
    low, high = scale
    return images.float().sub(low).div_(high - low).clamp_(0, 1)


def check_scaled_values(images: Tensor, scale: tuple[float, float]) -> None:
    """Check that float images are finite and not in 0..1 where ``scale`` is another, wide range; reads the values.

    Args:
        images: ``(B, C, H, W)``; integers pass.
        scale: The values that become 0 and 1.

    Raises:
        ValueError: If a value is NaN, or all lie in 0..1, some above 0, of a scale that is more than ten times as wide.
    """
    if images.is_floating_point() and images.numel() > 0:
        low, high = (float(bound) for bound in torch.aminmax(images))
        hint = "Check the files and the transform of the dataset, and fill pixels without data"
        require(not math.isnan(low + high), "images", "be finite", "NaN", hint)
        hint = "Give the policy `scale=None` if they are in 0..1 already"
        unit = low >= 0 and 0 < high <= 1 and scale[1] - scale[0] > 10
        require(not unit, "images", f"use the range of `scale`, {tuple(scale)}", (low, high), hint)


def check_scale(scale: PixelRange) -> None:
    """Check that ``scale`` is None or an ordered pair of different numbers."""
    hint = "Give the values that become 0 and 1, such as (0, 65535)"
    ok = scale is None or (not isinstance(scale, (int, float)) and len(scale) == 2 and scale[0] < scale[1])
    require(ok, "scale", "be a pair (low, high) with low < high", scale, hint)


def check_window(window: tuple[float, float]) -> None:
    """Check that a window is an ordered pair of different numbers; it may exceed 0..1, where no pixels are."""
    ordered = len(window) == 2 and window[0] < window[1]
    require(ordered, "window", "be a pair (low, high) with low < high", tuple(window), "Give (lower, higher)")


def check_input_spec(spec: object) -> dict[str, Any]:
    """Return an ``input_spec`` as a dict of plain numbers and lists, after checking its entries.

    Args:
        spec: "size", "mean" and "std", the last two None for images that are only scaled to 0..1; and "scale",
            "window", "indices" and "interpolation" where they differ; see `ViewPolicy.input_spec`.

    Raises:
        ValueError: If an entry is missing, unknown or out of its range.
    """
    hint = 'Give {"size": ..., "mean": ..., "std": ...}: checkpoints of a run with `ViewAugmentation` contain it'
    if not isinstance(spec, Mapping) or not spec.keys() >= {"size", "mean", "std"}:
        fail("input_spec", "hold the size, mean and std of the images", spec, hint)
    unknown = sorted(spec.keys() - {"size", "mean", "std", "scale", "window", "indices", "interpolation"})
    hint = 'Besides "size", "mean" and "std" it holds "scale", "window", "indices" and "interpolation"'
    require(not unknown, "input_spec", "have known entries", unknown, hint)
    height, width = check_size(spec["size"])
    known: dict[str, Any] = {"size": height if height == width else [height, width]}
    known |= {key: None if spec[key] is None else [float(value) for value in spec[key]] for key in ("mean", "std")}
    if spec.get("scale") is not None:
        check_scale(spec["scale"])
        known["scale"] = [float(value) for value in spec["scale"]]
    if "window" in spec:
        check_window(spec["window"])
        known["window"] = [float(value) for value in spec["window"]]
    if spec.get("indices"):
        known["indices"] = [[int(first), int(second)] for first, second in spec["indices"]]
    if "interpolation" in spec:
        check_choice("interpolation", spec["interpolation"], INTERPOLATIONS)
        known["interpolation"] = spec["interpolation"]
    return known


def as_float(images: Tensor) -> Tensor:
    """Return images ``(B, C, H, W)`` as float32 in 0..1: uint8 is divided by 255, floats are only cast."""
    return images.float() if images.is_floating_point() else images.float() / 255


def statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation as lists with one number per channel.

    Args:
        mean: One number per channel, or None for zeros.
        std: One number above 0 per channel, or None for ones.
        channels: Number of channels.

    Raises:
        ValueError: If only one of them is given, their length is not ``channels``, or a deviation is not above 0.
    """
    both = (mean is None) == (std is None)
    require(both, "mean", "be given together with `std`", (mean, std), "Give both, or neither")
    if mean is None or std is None:
        return [0.0] * channels, [1.0] * channels
    for name, values in (("mean", mean), ("std", std)):
        hint = f"Give {channels} numbers on the scale of pixels in 0..1"
        require(len(values) == channels, name, "have one number per channel", tuple(values), hint)
    hint = "Give the standard deviation of each channel, on the scale of pixels in 0..1"
    require(all(s > 0 for s in std), "std", "be above 0", tuple(std), hint)
    return [float(m) for m in mean], [float(s) for s in std]
