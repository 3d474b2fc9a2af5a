"""Brightness, contrast, saturation, hue and grayscale in one operation."""

import numpy as np
import torch
from kornia.augmentation import IntensityAugmentationBase2D
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast._checks import check_choice, check_not_negative, check_probability, require
from lightning_contrast.augment.fused.color_maps import BRIGHTNESS, HUE, MAPS, SATURATION, color_maps
from lightning_contrast.augment.fused.hue import shift_hue_
from lightning_contrast.augment.operation import (
    Draw,
    Form,
    FusedOperation,
    Plan,
    is_empty,
    put_back_,
    rows_where,
    take,
    uniform,
)

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as torchvision and Pillow weigh
_RGB = 3


class FusedColorJitter(FusedOperation, IntensityAugmentationBase2D):
    """Jitter the colours in an order drawn for each image, and turn some images grey.

    Brightness, contrast, saturation and grayscale (a saturation of 0) are maps of the colour channels, ``x -> gain * x
    + share * grey(x) + weight * mean(grey(x)) + offset``, with other numbers for each image; so a batch goes through
    them together although each image has an order of its own. Values are cut to 0..1 after each step, as
    torchvision's operations cut them: skipping the cuts would make one single map of all steps, but lets a bright
    image come out white where the contrast should have brought it back. Steps are put together only where there is
    nothing to cut between them (see `color_maps`). The hue is HSV's. The result therefore equals
    ``torchvision.transforms.ColorJitter`` on float images up to rounding; on 8-bit images torchvision rounds after
    each step.

    Args:
        brightness: Factor from U(max(0, 1 - b), 1 + b); >= 0.
        contrast: As ``brightness``.
        saturation: As ``brightness``.
        hue: Shift from U(-hue, hue) in turns; 0..0.5.
        p: Probability that an image is jittered.
        grayscale: Probability that an image is turned grey.
        additive_brightness: Add U(-b, b) to the values in the place of the factor (SimCLR v1, BYOL).
        gray_first: Turn grey before the jitter (NPID, MoCo v1).
        form: See `Form`.
        keepdim: Kornia's: return as many dimensions as were given.

    Shapes: ``(B, C, H, W)`` in 0..1. With one channel saturation, hue and grayscale change nothing; with any number
    other than 1 and 3 they are an error.
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
        form: Form = None,
        keepdim: bool = False,
    ) -> None:
        for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            check_not_negative(name, value)
        require(0 <= hue <= 0.5, "hue", "lie in [0, 0.5]", hue, "Give the largest shift in turns")
        check_probability("p", p)
        check_probability("grayscale", grayscale)
        check_choice("form", form, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.probability, self.grayscale = p, grayscale
        self.additive_brightness, self.gray_first, self.form = additive_brightness, gray_first, form
        self.flags = {"probability": p, "grayscale": grayscale}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``factors`` ``(B, 4)``, ``order`` ``(B, 4)``, ``jittered`` ``(B,)`` and ``gray`` ``(B,)``.

        With them come the ``maps`` and ``counts`` that they amount to (see `color_maps`), and ``hued`` ``(B,)``.
        """
        numbers = uniform(batch, 10)
        ranges = [self._range(spread) for spread in (self.brightness, self.contrast, self.saturation)]
        if self.additive_brightness:
            ranges[BRIGHTNESS] = (-self.brightness, self.brightness)
        low, high = np.array([*ranges, (-self.hue, self.hue)], dtype=np.float32).T
        draw: Draw = {
            "factors": low + (high - low) * numbers[:, :4],
            "order": numbers[:, 4:8].argsort(axis=1),
            "jittered": numbers[:, 8] < self.probability,
            "gray": numbers[:, 9] < self.grayscale,
        }
        return draw | {"hued": draw["jittered"] & (self.hue > 0)} | self._maps(draw)

    @staticmethod
    def _range(spread: float) -> tuple[float, float]:
        return max(0.0, 1 - spread), 1 + spread

    def _maps(self, draw: Draw) -> Draw:
        """Return the ``maps`` of a draw and their ``counts``: those of the jitter, and grey as a saturation of 0."""
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
        """Put images side by side that need the same maps: many before the hue, many after it, none."""
        before, after = draw["counts"].T
        key: NDArray[np.int64] = np.where(draw["hued"], 2 * MAPS * (after - before) - before, 4 * MAPS**2 - after)
        return key

    def prepare(self, draw: Draw) -> Plan:
        """Return the numbers of the maps, ``(2 * MAPS, 4, B)``, the rows that need each, and those whose hue shifts."""
        needed = (draw["counts"][:, :, None] > np.arange(MAPS)).reshape(-1, 2 * MAPS)
        spans = []
        for rows in needed.T:
            where = np.flatnonzero(rows)  # from the first to the last of them: identities lie between
            spans.append(slice(int(where[0]), int(where[-1]) + 1) if len(where) else slice(0, 0))
        turns = draw["factors"][draw["hued"], HUE]
        luma = np.array([LUMA], np.float32)
        maps = draw["maps"].transpose(1, 2, 0)
        return {"maps": maps, "spans": spans, "hued": rows_where(draw["hued"]), "turns": turns, "luma": luma}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Jitter and turn grey in place."""
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
        needs_rgb = self.saturation > 0 or self.hue > 0 or self.grayscale > 0
        require(
            channels in (1, _RGB) or not needs_rgb,
            "images",
            "have 3 channels for saturation, hue and grayscale",
            channels,
            "Set those to 0, which leaves brightness and contrast, or give the policy `color=False`",
        )


def _map_(images: Tensor, numbers: Tensor, luma: Tensor) -> None:
    """Apply a map to each image ``(B, C, H, W)`` in place, with ``numbers`` ``(4, B, 1, 1)``, and cut to 0..1."""
    gain, share, weight, offset = numbers.unbind(0)
    flat = images.flatten(2)  # (B, C, HW), a view: images are contiguous
    gray = torch.matmul(luma, flat)  # (B, 1, HW)
    added = torch.addcmul(offset, gray.mean(-1, keepdim=True), weight)
    torch.addcmul(gray.mul_(share).add_(added), flat, gain, out=flat).clamp_(0, 1)
