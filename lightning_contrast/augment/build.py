"""Policies built from the numbers of their views, of fused or of stock operations."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from lightning_contrast._checks import check_at_least, check_choice, require
from lightning_contrast.augment.operation import Form
from lightning_contrast.augment.policy import FusedView, ViewPolicy, statistics
from lightning_contrast.augment.recipe import BLUR_SIGMA, Auto, ViewRecipe

_RGB = 3


def make_policy(
    recipes: Sequence[ViewRecipe],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    fused: bool = True,
    channels: int = 3,
    color: bool = True,
    auto: Auto | None = None,
    form: Form = None,
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
        form: See `Form`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    from lightning_contrast.augment.stock import StockView, auto_augment

    check_choice("form", form, (None, "cpu", "accelerator"))
    check_choice("auto", auto, (None, "randaugment", "autoaugment", "trivialaugment"))
    check_at_least("channels", channels, 1)
    mend = "Set `color=False`, which leaves out saturation, hue and grayscale"
    require(channels in (1, _RGB) or not color, "channels", "be 3 (or 1) for the colour operations", channels, mend)
    require(channels == _RGB or auto is None, "auto", "be None unless `channels` is 3", auto, "Leave `auto` out")
    mean, std = statistics(mean, std, channels)
    views: list[nn.Module] = []
    for recipe in recipes:
        if not color or channels != _RGB:
            brightness, contrast, _, _ = recipe.jitter
            recipe = dataclasses.replace(recipe, jitter=(brightness, contrast, 0.0, 0.0), gray_p=0.0)  # noqa: PLW2901
        front = None if auto is None else auto_augment(auto)
        if fused:
            views.append(fused_view(recipe, mean, std, front, form))
        else:
            views.append(StockView(recipe, mean, std, front))
    interpolation = "bicubic" if recipes[0].bicubic else "bilinear"
    return ViewPolicy(views, size=recipes[0].size, channels=channels, mean=mean, std=std, interpolation=interpolation)


def fused_view(
    recipe: ViewRecipe, mean: Sequence[float], std: Sequence[float], front: nn.Module | None, form: Form
) -> FusedView:
    """Build one view of fused operations; what a recipe never does is left out."""
    from lightning_contrast.augment.fused import FusedColorJitter, FusedGaussianBlur, FusedResizedCrop, FusedSolarize
    from lightning_contrast.augment.operation import FusedOperation

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
    return FusedView(crop, operations, mean, std, front=front, form=form)
