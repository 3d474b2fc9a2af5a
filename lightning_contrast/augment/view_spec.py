"""Parameters of one view, and the options shared by all policies."""

import dataclasses
from typing import Literal, TypedDict

from lightning_contrast._checks import (
    check_at_least,
    check_not_negative,
    check_probability,
    check_range,
    require,
)
from lightning_contrast.augment.fused.base import Backend, FusedOperation

Auto = Literal["randaugment", "autoaugment", "trivialaugment"]


class ViewOptions(TypedDict, total=False):
    """Keyword arguments shared by all policies.

    Attributes:
        fused: Use fused operations; False uses stock Kornia, which is slower and point-samples downscaled crops.
        channels: Number of channels of the images; any other than 1 and 3 needs ``color=False``.
        color: Apply saturation, hue and grayscale, which are defined for RGB only.
        auto: ``"randaugment"``, ``"autoaugment"`` or ``"trivialaugment"``, drawn for each image and applied before each
            view, with one call of Kornia for each operation in use. Kornia's code reads single values on the host and
            so may synchronize with an accelerator; no other option does.
        backend: ``"cpu"``, ``"accelerator"``, or None to choose by the device of the images.
        locations: Make every view a `LocatedView`, which remembers its place in the image; needs ``fused=True``.
    """

    fused: bool
    channels: int
    color: bool
    auto: Auto | None
    backend: Backend
    locations: bool


@dataclasses.dataclass(frozen=True)
class ViewSpec:
    """Parameters of one random view.

    Attributes:
        size: Edge in pixels, >= 1.
        scale: Range of the crop's share of the image area, in (0, 1].
        jitter: Strengths of brightness, contrast, saturation (>= 0) and hue (0..0.5).
        jitter_p: Probability of the jitter.
        gray_p: Probability of grayscale.
        blur_p: Probability of the blur.
        solarize_p: Probability of solarization.
        flip: Probability of a horizontal flip.
        blur_kernel: Size of the blur's kernel in pixels, odd; None fits it to sigma.
        bicubic: Bicubic instead of bilinear resampling; overshoots are clipped to 0..1.
        gray_first: Apply grayscale before the jitter.
        additive_brightness: Add the brightness instead of multiplying by it.
        clamp: Clip crop boxes that do not fit instead of redrawing them.
        ratio: Range of the crop's width / height.
        vertical_flip: Probability of a vertical flip.
        quarter_turns: Turn by 0, 90, 180 or 270 degrees, equally likely.
        band_gray: Apply grayscale to images of any number of channels, as the mean of their bands.
        first_operations: Further operations, after crop, flips and turns and before the colors.
        last_operations: Further operations, at the end, before the normalization.
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
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    vertical_flip: float = 0.0
    quarter_turns: bool = False
    band_gray: bool = False
    first_operations: tuple[FusedOperation, ...] = ()
    last_operations: tuple[FusedOperation, ...] = ()

    @property
    def moves_pixels(self) -> bool:
        """Whether a view shows more than a box of the image, flipped or not from left to right."""
        further = (*self.first_operations, *self.last_operations)
        return self.vertical_flip > 0 or self.quarter_turns or any(operation.moves_pixels for operation in further)

    def __post_init__(self) -> None:
        """Check the parameters, for fused and stock operations alike."""
        check_at_least("size", self.size, 1)
        check_range("scale", self.scale, 0.0, 1.0)
        require(self.scale[0] > 0, "scale", "start above 0", self.scale, "Give the smallest share of the area")
        for name, value in zip(("brightness", "contrast", "saturation"), self.jitter, strict=False):
            check_not_negative(name, value)
        require(0 <= self.jitter[3] <= 0.5, "hue", "lie in [0, 0.5]", self.jitter[3], "Give a smaller strength")
        for name in ("jitter_p", "gray_p", "blur_p", "solarize_p", "flip", "vertical_flip"):
            check_probability(name, getattr(self, name))


BLUR_SIGMA = (0.1, 2.0)  # standard deviation in pixels, the same in all published pipelines


def odd_tenth(size: int) -> int:
    """Return the blur's kernel size of SimCLR and BYOL: a tenth of ``size``, rounded to an odd number."""
    return size // 10 // 2 * 2 + 1
