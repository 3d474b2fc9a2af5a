"""The numbers of one view, and the modules that they stand for."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypedDict

from torch import nn

from lightning_contrast._checks import (
    check_at_least,
    check_choice,
    check_not_negative,
    check_probability,
    check_range,
    require,
)
from lightning_contrast.augment.operation import Form
from lightning_contrast.augment.policy import FusedView, ViewPolicy, statistics

Auto = Literal["randaugment", "autoaugment", "trivialaugment"]


class ViewOptions(TypedDict, total=False):
    """What every policy takes by keyword.

    Attributes:
        fused: False makes the views of stock Kornia operations: slower, and point-sampled where the crop shrinks.
        channels: Number of channels of the images; other than 1 and 3 they need ``color=False``.
        color: False leaves out saturation, hue and grayscale, which mean nothing but for RGB.
        auto: ``"randaugment"``, ``"autoaugment"`` or ``"trivialaugment"``: Kornia's, in front of each view.
        form: ``"cpu"``, ``"accelerator"`` or None for the form that suits the device of the images.
    """

    fused: bool
    channels: int
    color: bool
    auto: Auto | None
    form: Form


@dataclasses.dataclass(frozen=True)
class ViewRecipe:
    """The published numbers of one view.

    Attributes:
        size: Edge in pixels.
        scale: Range of the crop's share of the area.
        jitter: Strength of brightness, contrast, saturation and hue.
        jitter_p: Probability of the jitter.
        gray_p: Probability of grayscale.
        blur_p: Probability of the blur.
        solarize_p: Probability of solarization.
        flip: Probability of mirroring.
        blur_kernel: Pixels of the blur's kernel, or None for as many as its sigma needs.
        bicubic: Bicubic resampling in the place of bilinear; its overshoots are cut to 0..1.
        gray_first: Grayscale before the jitter.
        additive_brightness: Brightness is added and not multiplied.
        clamp: Boxes that do not fit are cut and not drawn again.
    """

    size: int
    scale: tuple[float, float]
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    solarize_p: float = 0.0
    flip: float = 0.5
    blur_kernel: int | None = None
    bicubic: bool = False
    gray_first: bool = False
    additive_brightness: bool = False
    clamp: bool = False

    def __post_init__(self) -> None:
        """Check the numbers here, for the fused and the stock operations alike."""
        check_at_least("size", self.size, 1)
        check_range("scale", self.scale, 0.0, 1.0)
        require(self.scale[0] > 0, "scale", "start above 0", self.scale, "Give the smallest share of the area")
        for name, value in zip(("brightness", "contrast", "saturation"), self.jitter, strict=False):
            check_not_negative(name, value)
        require(0 <= self.jitter[3] <= 0.5, "hue", "lie in [0, 0.5]", self.jitter[3], "Give a smaller strength")
        for name in ("jitter_p", "gray_p", "blur_p", "solarize_p", "flip"):
            check_probability(name, getattr(self, name))


BLUR_SIGMA = (0.1, 2.0)  # of all published pipelines
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
