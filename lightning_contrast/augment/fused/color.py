"""Random brightness, contrast, saturation, hue and grayscale in one operation."""

from typing import NamedTuple

import numpy as np
import torch
from kornia.augmentation import IntensityAugmentationBase2D
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast._checks import check_choice, check_interval, check_not_negative, check_probability, require
from lightning_contrast.augment.fused.base import (
    Backend,
    Draw,
    FusedOperation,
    Plan,
    is_empty,
    put_back_,
    rows_where,
    take,
    towards,
    uniform,
)

_CENTERS = (1 / 2, 1 / 3, 2 / 3)  # hue in turns where red is least, green is greatest, blue is greatest


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# Whether brightness, contrast, saturation and hue scale the color, the gray image and its mean.
_MULTIPLIES = np.array([(True, True, True), (True, True, False), (True, False, False), (False, False, False)])


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow; torchvision rounds red to 0.2989
_RGB = 3


class FusedColorJitter(FusedOperation, IntensityAugmentationBase2D):
    """Jitter brightness, contrast, saturation and hue in an order drawn per image, and convert some images to gray.

    Brightness, contrast, saturation and grayscale (a saturation of 0) are maps of the form ``x -> gain * x + share *
    gray(x) + weight * mean(gray(x)) + offset``. Their coefficients differ between images, so that one kernel serves the
    whole batch although each image has its own order of steps. As in torchvision, values are clipped to 0..1 after each
    step: without clipping, all steps would form a single map, but an overexposed image would stay white where a later
    contrast step has to darken it. Steps are therefore merged only if nothing can be clipped between them (see
    `color_maps`). The hue is shifted in HSV.

    The result equals ``torchvision.transforms.ColorJitter`` on float images except for the luma: torchvision weighs red
    by 0.2989 instead of 0.299 (ITU-R BT.601), so that pixels differ by up to 4e-4. On 8-bit images torchvision also
    rounds after each step.

    Args:
        brightness: Strength b of a factor from U(max(0, 1 - b), 1 + b); >= 0.
        contrast: As ``brightness``.
        saturation: As ``brightness``.
        hue: Limit of a shift from U(-hue, hue) in turns; 0..0.5.
        p: Probability of the jitter per image.
        grayscale: Probability of the conversion to gray per image.
        additive_brightness: Add a number from U(-b, b) instead of multiplying (SimCLR v1, BYOL).
        gray_first: Convert to gray before the jitter (NPID, MoCo v1).
        band_gray: Allow grayscale with any number of channels, of which it takes the mean unless there are 3.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1. With one channel, saturation, hue and grayscale are no-ops; with any number other
    than 1 and 3 they are an error, except for grayscale with ``band_gray``.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        *,
        p: float = 1.0,
        grayscale: float = 0.0,
        additive_brightness: bool = False,
        gray_first: bool = False,
        band_gray: bool = False,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            check_not_negative(name, value)
        check_interval("hue", hue, "[0, 0.5]", "Give the largest shift in turns")
        check_probability("p", p)
        check_probability("grayscale", grayscale)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.probability, self.grayscale = p, grayscale
        self.additive_brightness, self.gray_first, self.backend = additive_brightness, gray_first, backend
        self.band_gray = band_gray
        self.flags = {"probability": p, "grayscale": grayscale}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``factors`` ``(B, 4)``, ``order`` ``(B, 4)``, ``jittered`` ``(B,)`` and ``gray`` ``(B,)``.

        The draw also holds the resulting ``maps`` and ``counts`` (see `color_maps`), and ``hued`` ``(B,)``.
        """
        numbers = uniform(batch, 10)
        spreads = (self.brightness, self.contrast, self.saturation, self.hue)
        brightness, contrast, saturation, hue = (towards(spread, 0.0, self.share) for spread in spreads)
        ranges = [self._range(spread) for spread in (brightness, contrast, saturation)]
        if self.additive_brightness:
            ranges[BRIGHTNESS] = (-brightness, brightness)
        low, high = np.array([*ranges, (-hue, hue)], dtype=np.float32).T
        draw: Draw = {
            "factors": low + (high - low) * numbers[:, :4],
            "order": numbers[:, 4:8].argsort(axis=1),
            "jittered": numbers[:, 8] < self.probability,
            "gray": numbers[:, 9] < towards(self.grayscale, 0.0, self.share),
        }
        return draw | {"hued": draw["jittered"] & (self.hue > 0)} | self._maps(draw)

    @staticmethod
    def _range(spread: float) -> tuple[float, float]:
        return max(0.0, 1 - spread), 1 + spread

    def _maps(self, draw: Draw) -> Draw:
        """Return the ``maps`` and ``counts`` of the jitter and of grayscale, which is a saturation of 0."""
        order = draw["order"]
        batch, steps = order.shape
        done = draw["jittered"][:, None] & ((order != HUE) | (self.hue > 0))
        gray = 0 if self.gray_first else steps
        jitter = slice(1, None) if self.gray_first else slice(steps)
        kinds = np.full((batch, steps + 1), SATURATION)
        factors = np.ones((batch, steps + 1), np.float32)
        kinds[:, jitter] = np.where(done, order, SATURATION)
        factors[:, jitter] = np.where(done, draw["factors"][np.arange(batch)[:, None], order], np.float32(1))
        factors[draw["gray"], gray] = 0
        maps = color_maps(kinds, factors, additive_brightness=self.additive_brightness)
        return {"maps": maps.numbers, "counts": maps.counts}

    def sort_key(self, draw: Draw) -> NDArray[np.int64]:
        """Return keys ``(B,)`` that sort images by the maps they need: more before the hue, more after it, none."""
        before, after = draw["counts"].T
        key: NDArray[np.int64] = np.where(draw["hued"], 2 * MAPS * (after - before) - before, 4 * MAPS**2 - after)
        return key

    def prepare(self, draw: Draw) -> Plan:
        """Return the maps' coefficients ``(2 * MAPS, 4, B)``, the rows that need each, and those with a hue shift."""
        needed = (draw["counts"][:, :, None] > np.arange(MAPS)).reshape(-1, 2 * MAPS)
        spans = []
        for rows in needed.T:
            where = np.flatnonzero(rows)  # from first to last; maps of rows between them are identities
            spans.append(slice(int(where[0]), int(where[-1]) + 1) if len(where) else slice(0, 0))
        turns = draw["factors"][draw["hued"], HUE]
        luma = np.array([LUMA], np.float32)
        maps = draw["maps"].transpose(1, 2, 0)
        return {"maps": maps, "spans": spans, "hued": rows_where(draw["hued"]), "turns": turns, "luma": luma}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Jitter ``images`` ``(B, C, H, W)`` and convert to gray, in place."""
        self._check_channels(images.shape[1])
        images = images.contiguous()
        rgb = images.shape[1] == _RGB
        luma = plan["luma"] if rgb else torch.full_like(plan["luma"][:, :1], 1 / images.shape[1])
        luma = luma.to(images.dtype).expand(1, images.shape[1])
        maps = plan["maps"].to(images.dtype)[..., None, None]  # (2 * MAPS, 4, B, 1, 1)
        for slot, rows in enumerate(plan["spans"]):
            if slot == MAPS and rgb and not is_empty(plan["hued"]):
                chosen = take(images, plan["hued"])
                put_back_(images, plan["hued"], shift_hue_(chosen, plan["turns"].to(images.dtype)))
            if not is_empty(rows):
                _map_(images[rows], maps[slot, :, rows], luma)
        return images

    def _check_channels(self, channels: int) -> None:
        needs_rgb = self.saturation > 0 or self.hue > 0 or (self.grayscale > 0 and not self.band_gray)
        require(
            channels in (1, _RGB) or not needs_rgb,
            "images",
            "have 3 channels for saturation, hue and grayscale",
            channels,
            "Set them to 0, which keeps brightness and contrast, or give the policy `color=False`",
        )


def _map_(images: Tensor, coefficients: Tensor, luma: Tensor) -> None:
    """Apply maps with coefficients ``(4, B, 1, 1)`` to images ``(B, C, H, W)`` in place, and clip to 0..1."""
    gain, share, weight, offset = coefficients.unbind(0)
    flat = images.flatten(2)  # (B, C, HW), a view: images are contiguous
    gray = torch.matmul(luma, flat)  # (B, 1, HW)
    added = torch.addcmul(offset, gray.mean(-1, keepdim=True), weight)
    torch.addcmul(gray.mul_(share).add_(added), flat, gain, out=flat).clamp_(0, 1)


class ColorMaps(NamedTuple):
    """Color maps of each image of a batch.

    Attributes:
        numbers: Gain, share, weight and offset of each map, ``(B, 2 * MAPS, 4)``: `MAPS` before the hue and `MAPS`
            after it; unused ones are identities.
        counts: Number of maps used before and after the hue, ``(B, 2)``; without a hue all count as after it.
    """

    numbers: NDArray[np.float32]
    counts: NDArray[np.int64]


def color_maps(
    kinds: NDArray[np.int64], factors: NDArray[np.float32], *, additive_brightness: bool = False
) -> ColorMaps:
    """Merge the steps of each image into the fewest maps with the same result.

    With gray(x) the luma, every step except the hue is ``x -> gain * x + share * gray(x) + weight * mean(gray(x)) +
    offset``, and so is a sequence of steps: an image is the sum of its color ``x - gray(x)``, its gray image
    ``gray(x) - mean(gray(x))`` and its mean, and each step scales some of these. Values are clipped to 0..1 after each
    step; only a step that increases brightness, contrast or saturation can leave that range, so a map ends at such a
    step and at the hue.

    Args:
        kinds: Kind of each step, ``(B, S)``: `BRIGHTNESS`, `CONTRAST`, `SATURATION` or, at most once, `HUE`; at most
            `MAPS` steps besides the hue.
        factors: Factor of each step, ``(B, S)``, >= 0; 1 is the identity. Those of the hue are not read.
        additive_brightness: Factors of brightness are added, in -1..1; 0 is the identity.

    Returns:
        The maps ``(B, 2 * MAPS, 4)`` and their counts ``(B, 2)``.
    """
    hue = kinds == HUE
    added = (kinds == BRIGHTNESS) & additive_brightness
    changes = ~hue & (factors != np.where(added, 0, 1))
    ends = changes & (added | (factors > 1))
    half = hue.cumsum(axis=1)
    half[half[:, -1] == 0] = 1
    place = ends.cumsum(axis=1) - ends
    place -= half * (ends & (half == 0)).sum(axis=1, keepdims=True)
    slot = MAPS * half + place
    rows = np.arange(len(kinds))
    factors_of = np.where(_MULTIPLIES[kinds] & ~added[..., None], factors[..., None], np.float32(1))
    scale = np.ones((len(kinds), 2 * MAPS, 3), np.float32)
    offset = np.zeros((len(kinds), 2 * MAPS), np.float32)
    for step in range(kinds.shape[1]):
        scale[rows, slot[:, step]] *= factors_of[:, step]
        if additive_brightness:
            offset[rows, slot[:, step]] += np.where(added[:, step], factors[:, step], 0)  # ends a map
    gain, share, weight = scale[..., 0], scale[..., 1] - scale[..., 0], scale[..., 2] - scale[..., 1]
    counts = [((place + 1) * (changes & (half == h))).max(axis=1) for h in (0, 1)]
    return ColorMaps(np.stack([gain, share, weight, offset], axis=2), np.stack(counts, axis=1))


MAPS = 4  # maximum number of maps of an image before the hue, and after it


def shift_hue_(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of RGB images in HSV in place; value and saturation are unchanged.

    Equals ``torchvision.transforms.functional.adjust_hue`` on float images up to rounding. With V the maximum, m the
    minimum and C = V - m, the hue in sixths of a turn is ``1 + (g + b - r - m) / C`` with the sign of ``g - b``. With
    the shifted hue h in 0..1 turns, each channel is a ramp between V and m in the distance of h from the channel's
    center, ``clamp(6 |h - center| - 1, 0, 1)``, without branches or sector tables.

    Args:
        images: RGB in 0..1, ``(B, 3, H, W)``; overwritten.
        turns: Shift per image in turns, ``(B,)``, -0.5..0.5.

    Returns:
        ``images`` ``(B, 3, H, W)``.
    """
    red, green, blue = images[:, 0], images[:, 1], images[:, 2]
    ramp = torch.empty_like(images)
    spare, difference = ramp[:, 0], ramp[:, 1]  # scratch space until the ramps are written
    value = torch.maximum(red, green)
    torch.maximum(value, blue, out=value)
    least = torch.minimum(red, green)
    torch.minimum(least, blue, out=least)
    chroma = value - least
    hue = torch.sub(green, red).add_(blue).sub_(least)
    # in turns; for a chroma of 0 the hue has no effect but must be finite
    torch.mul(chroma, 6, out=spare).add_(torch.finfo(images.dtype).tiny)
    hue.div_(spare).add_(1 / 6)
    torch.copysign(hue, torch.sub(green, blue, out=difference), out=hue)
    hue.add_(turns[:, None, None] + 1).frac_()
    for channel, center in enumerate(_CENTERS):
        torch.sub(hue, center, out=ramp[:, channel])
    ramp.abs_().mul_(6).sub_(1).clamp_(0, 1)
    torch.addcmul(least, chroma, ramp[:, 0], out=red)
    torch.addcmul(value[:, None], chroma[:, None], ramp[:, 1:], value=-1, out=images[:, 1:])
    return images
