"""Parameters of one view, and the options shared by all policies."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, TypeAlias, TypedDict

from torch import Tensor

from lightning_contrast._checks import check_interval, check_not_negative, check_probability, check_range, require
from lightning_contrast.augment.fused.base import Backend, FusedOperation, towards
from lightning_contrast.augment.images import Size, check_size

Auto = Literal["randaugment", "autoaugment", "trivialaugment"]

_CHANCES = ("gray_p", "solarize_p", "rotation_p", "noise_p", "erase_p")  # scaled by a strength

PreTransform: TypeAlias = Callable[[Tensor], Tensor] | None
"""Images ``(B, C, H, W)``, float32 in 0..1, to images ``(B, C, H', W')``; a function or a module."""


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
        pre_transform: Applied to the images, float32 in 0..1, before each view (after ``auto``), for anything that
            policies do not have: a function or module that returns as many images, in 0..1 (it is clipped), such as one
            of Kornia's, and leaves its argument as it is. It is called once per view, so random ones differ between
            views; `ViewPolicy.eval_transform` leaves it out. With ``locations`` it has to keep every pixel in place.
    """

    fused: bool
    channels: int
    color: bool
    auto: Auto | None
    backend: Backend
    locations: bool
    pre_transform: PreTransform


@dataclasses.dataclass(frozen=True)
class ViewSpec:
    """Parameters of one random view.

    Attributes:
        size: Edge in pixels, or height and width, >= 1.
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
        quarter_turns: Turn by 0, 90, 180 or 270 degrees, equally likely; square views only.
        band_gray: Apply grayscale to images of any number of channels, as the mean of their bands.
        first_operations: Further operations, after crop, flips and turns and before the colors.
        last_operations: Further operations, at the end, before erasing and normalization.
        rotation: Limit of a rotation in degrees, 0..180, bilinear, after flips and turns; the border is repeated.
        rotation_p: Probability of the rotation.
        noise_p: Probability of Gaussian noise, after blur and solarization.
        noise_std: Standard deviation of the noise, on the scale of pixels in 0..1.
        erase_p: Probability of random erasing: a box becomes the mean, 0 after the normalization.
        erase_scale: Range of the erased share of the view, in (0, 1].
        erase_ratio: Range of the erased box's height / width.
    """

    size: Size
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
    rotation: float = 0.0
    rotation_p: float = 1.0
    noise_p: float = 0.0
    noise_std: float = 0.05
    erase_p: float = 0.0
    erase_scale: tuple[float, float] = (0.02, 0.33)
    erase_ratio: tuple[float, float] = (0.3, 3.3)

    @property
    def moves_pixels(self) -> bool:
        """Whether a view shows more than a box of the image, flipped or not from left to right."""
        further = (*self.first_operations, *self.last_operations)
        moved = self.vertical_flip > 0 or self.quarter_turns or self.rotates
        return moved or any(operation.moves_pixels for operation in further)

    @property
    def rotates(self) -> bool:
        """Whether some views are rotated by other angles than quarter turns."""
        return self.rotation > 0 and self.rotation_p > 0

    def __post_init__(self) -> None:
        """Check the parameters, for fused and stock operations alike."""
        height, width = check_size(self.size)
        hint = "Give one edge as `size`, or leave the turns out"
        require(height == width or not self.quarter_turns, "size", "be square with quarter turns", self.size, hint)
        check_range("scale", self.scale, 0.0, 1.0)
        require(self.scale[0] > 0, "scale", "start above 0", self.scale, "Give the smallest share of the area")
        for name, value in zip(("brightness", "contrast", "saturation"), self.jitter, strict=False):
            check_not_negative(name, value)
        check_interval("hue", self.jitter[3], "[0, 0.5]", "Give a smaller strength")
        for name in ("jitter_p", "gray_p", "blur_p", "solarize_p", "flip", "vertical_flip"):
            check_probability(name, getattr(self, name))
        for name in ("rotation_p", "noise_p", "erase_p"):
            check_probability(name, getattr(self, name))
        check_interval("rotation", self.rotation, "[0, 180]", "Give the largest angle")
        check_not_negative("noise_std", self.noise_std)
        check_range("erase_scale", self.erase_scale, 0.0, 1.0)
        check_range("erase_ratio", self.erase_ratio, 0.0, math.inf)
        for name in ("erase_scale", "erase_ratio"):
            low = getattr(self, name)[0]
            require(low > 0, name, "start above 0", low, "Give the smallest share of the area, or height / width")

    def at_strength(self, strength: float) -> "ViewSpec":
        """Return the parameters at a strength in 0..1, as of `ViewPolicy.set_strength`."""
        low, high = (towards(share, 1.0, strength) for share in self.scale)
        brightness, contrast, saturation, hue = (towards(spread, 0.0, strength) for spread in self.jitter)
        chances = {name: strength * getattr(self, name) for name in _CHANCES}
        ratio = (self.ratio[0] ** strength, self.ratio[1] ** strength)
        return dataclasses.replace(
            self,
            scale=(low, high),
            jitter=(brightness, contrast, saturation, hue),
            ratio=ratio,
            **chances,
        )


BLUR_SIGMA = (0.1, 2.0)  # standard deviation in pixels, the same in all published pipelines


def odd_tenth(size: Size) -> int:
    """Return the blur's kernel size of SimCLR and BYOL: a tenth of the shorter edge, rounded to an odd number."""
    return min(check_size(size)) // 10 // 2 * 2 + 1
