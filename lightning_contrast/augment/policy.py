"""A view policy: images in, a list of random views out; and the plain form of the images for evaluation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, require
from lightning_contrast.augment.fused.base import Backend, FusedOperation
from lightning_contrast.augment.fused.view import FusedView
from lightning_contrast.augment.images import as_float, check_images, full_precision, statistics
from lightning_contrast.augment.view_spec import BLUR_SIGMA, Auto, ViewRecipe

_RGB = 3


class ViewPolicy(nn.Module):
    """Make the views of a batch, all on the device of the images.

    Args:
        views: One module a view: images ``(B, C, H, W)`` to ``(B, C, h, w)``.
        size: Edge in pixels of the plain images, and of the (global) views.
        channels: Number of channels of the images.
        mean: Subtracted from every channel at the end; None subtracts nothing.
        std: Every channel is divided by it at the end; None divides by nothing.
        interpolation: How `eval_transform` resizes: ``"bilinear"`` or ``"bicubic"``.

    Attributes:
        size: As given.
        mean: A list of numbers, one a channel.
        std: A list of numbers, one a channel.
        input_spec: ``{"size", "mean", "std"}`` in plain Python: what a backbone that was trained on these views needs.
    """

    def __init__(
        self,
        views: Sequence[nn.Module],
        *,
        size: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        check_at_least("size", size, 1)
        check_at_least("channels", channels, 1)
        check_choice("interpolation", interpolation, ("bilinear", "bicubic"))
        self.views = nn.ModuleList(views)
        self.size, self.channels, self.interpolation = size, channels, interpolation
        self.mean, self.std = statistics(mean, std, channels)

    @property
    def input_spec(self) -> dict[str, Any]:
        """What a backbone trained on these views expects: ``{"size", "mean", "std"}``."""
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std)}

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the random views of a batch.

        All random numbers come from torch's global CPU generator.

        Args:
            images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1, at least one pixel.

        Returns:
            One float tensor ``(B, C, h, w)`` a view.
        """
        images = check_images(images, self.channels)
        # inside autocast the matrix products of the resampling would round pixels to 8 bits of mantissa
        with full_precision(images.device):
            return [view(images) for view in self.views]

    @torch.no_grad()
    def eval_transform(self, images: Tensor) -> Tensor:
        """Return the images as evaluation sees them: resized, centre-cropped to the policy's size and normalised.

        The shorter side is resized to the size (antialiased); images of that size already are not resampled.

        Args:
            images: As for `forward`.

        Returns:
            ``(B, C, size, size)``, float.
        """
        images = check_images(images, self.channels)
        pixels = as_float(images)
        height, width = pixels.shape[-2:]
        if min(height, width) != self.size:
            scale = self.size / min(height, width)
            edges = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
            with full_precision(images.device):
                pixels = F.interpolate(pixels, edges, mode=self.interpolation, antialias=True).clamp_(0, 1)
            height, width = edges
        top, left = (height - self.size) // 2, (width - self.size) // 2
        pixels = pixels[..., top : top + self.size, left : left + self.size]
        pixels = pixels.clone(memory_format=torch.contiguous_format)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            if (mean, std) != (0.0, 1.0):  # plain numbers: no tensor of them has to reach the device
                pixels[:, channel].sub_(mean).div_(std)
        return pixels


def make_policy(
    recipes: Sequence[ViewRecipe],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    fused: bool = True,
    channels: int = 3,
    color: bool = True,
    auto: Auto | None = None,
    backend: Backend = None,
) -> ViewPolicy:
    """Build a policy with one view for each recipe; the first gives the policy's size.

    Args:
        recipes: The numbers of each view.
        mean: See `ViewPolicy`.
        std: See `ViewPolicy`.
        fused: See `ViewOptions`, as for the others.
        channels: Number of channels.
        color: Whether to keep saturation, hue and grayscale.
        auto: Automatic augmentation in front.
        backend: See `Backend`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    from lightning_contrast.augment.kornia_view import StockView, auto_augment

    check_choice("backend", backend, (None, "cpu", "accelerator"))
    check_choice("auto", auto, (None, "randaugment", "autoaugment", "trivialaugment"))
    check_at_least("channels", channels, 1)
    hint = "Set `color=False`, which leaves out saturation, hue and grayscale"
    require(channels in (1, _RGB) or not color, "channels", "be 3 (or 1) for the colour operations", channels, hint)
    require(channels == _RGB or auto is None, "auto", "be None unless `channels` is 3", auto, "Leave `auto` out")
    mean, std = statistics(mean, std, channels)
    views: list[nn.Module] = []
    for recipe in recipes:
        if not color or channels != _RGB:
            brightness, contrast, _, _ = recipe.jitter
            recipe = dataclasses.replace(recipe, jitter=(brightness, contrast, 0.0, 0.0), gray_p=0.0)  # noqa: PLW2901
        pre_transform = None if auto is None else auto_augment(auto)
        if fused:
            views.append(fused_view(recipe, mean, std, pre_transform, backend))
        else:
            views.append(StockView(recipe, mean, std, pre_transform))
    interpolation = "bicubic" if recipes[0].bicubic else "bilinear"
    return ViewPolicy(views, size=recipes[0].size, channels=channels, mean=mean, std=std, interpolation=interpolation)


def fused_view(
    recipe: ViewRecipe, mean: Sequence[float], std: Sequence[float], pre_transform: nn.Module | None, backend: Backend
) -> FusedView:
    """Build one view of fused operations; what a recipe never does is left out."""
    from lightning_contrast.augment.fused import FusedColorJitter, FusedGaussianBlur, FusedResizedCrop, FusedSolarize

    crop = FusedResizedCrop(
        recipe.size,
        recipe.scale,
        flip=recipe.flip,
        interpolation="bicubic" if recipe.bicubic else "bilinear",
        fit="clamp" if recipe.clamp else "retry",
    )
    color = FusedColorJitter(
        *recipe.jitter,
        p=recipe.jitter_p,
        grayscale=recipe.gray_p,
        additive_brightness=recipe.additive_brightness,
        gray_first=recipe.gray_first,
    )
    operations: list[FusedOperation] = [color]
    if recipe.blur_p > 0 and recipe.blur_kernel != 1:
        operations.append(FusedGaussianBlur(recipe.blur_p, BLUR_SIGMA, kernel_size=recipe.blur_kernel))
    if recipe.solarize_p > 0:
        operations.append(FusedSolarize(recipe.solarize_p))
    return FusedView(crop, operations, mean, std, pre_transform=pre_transform, backend=backend)
