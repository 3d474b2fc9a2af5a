"""The numbers of one view, and the modules that they stand for."""

import dataclasses
from typing import Literal, TypedDict

from lightning_contrast._checks import (
    check_at_least,
    check_not_negative,
    check_probability,
    check_range,
    require,
)
from lightning_contrast.augment.fused.base import Backend

Auto = Literal["randaugment", "autoaugment", "trivialaugment"]


class ViewOptions(TypedDict, total=False):
    """What every policy takes by keyword.

    Attributes:
        fused: False makes the views of stock Kornia operations: slower, and point-sampled where the crop shrinks.
        channels: Number of channels of the images; other than 1 and 3 they need ``color=False``.
        color: False leaves out saturation, hue and grayscale, which mean nothing but for RGB.
        auto: ``"randaugment"``, ``"autoaugment"`` or ``"trivialaugment"``: Kornia's, in front of each view. Their
            code reads single values on the host, so these views may wait for an accelerator; all others never do.
        backend: ``"cpu"``, ``"accelerator"`` or None for the form that suits the device of the images.
    """

    fused: bool
    channels: int
    color: bool
    auto: Auto | None
    backend: Backend


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
