"""Checks and conversions of image batches."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lightning_contrast._checks import fail, require


def check_images(images: object, channels: int) -> Tensor:
    """Return ``images`` if they are a batch that a policy takes.

    Args:
        images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1. Values are not read.
        channels: The number of channels that the policy was made for.

    Raises:
        TypeError: If it is no tensor, or its dtype is neither uint8 nor floating.
        ValueError: If its shape is not ``(B, channels, H, W)``.
    """
    if not isinstance(images, Tensor):
        fail("images", "be a tensor (B, C, H, W)", type(images).__name__, "Stack the images of the batch", TypeError)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        hint = "Convert with `images.to(torch.uint8)` if the values are 0..255, else divide them by their largest value"
        fail("images", "be uint8 in 0..255 or floating in 0..1", str(images.dtype), hint, TypeError)
    hint = "Give a batch (B, C, H, W); one image is `image[None]`"
    require(images.ndim == 4, "images", "have 4 dimensions", tuple(images.shape), hint)
    hint = f"Make the policy with `channels={images.shape[1]}`, or give images with {channels} channels"
    require(images.shape[1] == channels, "images", f"have {channels} channels", tuple(images.shape), hint)
    hint = "Leave out empty batches"
    require(images.numel() > 0, "images", "hold at least one image of at least one pixel", tuple(images.shape), hint)
    return images


def as_float(images: Tensor) -> Tensor:
    """Return images as float32 in 0..1: uint8 divided by 255, floats as they are."""
    return images.float() if images.is_floating_point() else images.float() / 255


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off for a device."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation as lists with one number a channel.

    Args:
        mean: One number a channel, or None for zeros.
        std: One number above 0 a channel, or None for ones.
        channels: How many numbers there must be.

    Raises:
        ValueError: If only one of them is given, or the numbers are not as stated.
    """
    both = (mean is None) == (std is None)
    require(both, "mean", "be given together with `std`", (mean, std), "Give both, or neither")
    if mean is None or std is None:
        return [0.0] * channels, [1.0] * channels
    for name, values in (("mean", mean), ("std", std)):
        hint = f"Give {channels} numbers on the scale of pixels in 0..1"
        require(len(values) == channels, name, "have one number a channel", tuple(values), hint)
    hint = "Give the standard deviation of each channel, on the scale of pixels in 0..1"
    require(all(s > 0 for s in std), "std", "be above 0", tuple(std), hint)
    return [float(m) for m in mean], [float(s) for s in std]
