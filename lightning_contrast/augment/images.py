"""Validation and conversion of image batches."""

from collections.abc import Sequence

from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.contracts import check_images


def check_policy_input(images: object, channels: int) -> Tensor:
    """Return ``images`` if they are a batch that a policy accepts.

    Args:
        images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1. Values are not read.
        channels: Number of channels that the policy expects.

    Returns:
        The images ``(B, C, H, W)``, uint8 or float32.

    Raises:
        TypeError: If it is not a tensor, or its dtype is neither uint8 nor floating.
        ValueError: If its shape is not ``(B, channels, H, W)`` or it has no elements.
    """
    if not isinstance(images, Tensor):
        fail("images", "be a tensor (B, C, H, W)", type(images).__name__, "Stack the images of the batch", TypeError)
    images = check_images(images, values=False, evaluating=False)
    hint = f"Make the policy with `channels={images.shape[1]}`, or give images with {channels} channels"
    require(images.shape[1] == channels, "images", f"have {channels} channels", tuple(images.shape), hint)
    hint = "Skip empty batches"
    require(images.numel() > 0, "images", "hold at least one image of at least one pixel", tuple(images.shape), hint)
    return images


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
