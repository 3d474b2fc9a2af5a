"""Brightness, contrast, saturation, hue and grayscale in one operation."""

from typing import cast

import numpy as np
import torch
from kornia.augmentation import IntensityAugmentationBase2D
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast._checks import check_choice, check_not_negative, check_probability, require
from lightning_contrast.augment.fused.hue import shift_hue_
from lightning_contrast.augment.operation import (
    Draw,
    Form,
    FusedOperation,
    Plan,
    is_empty,
    put_,
    put_back_,
    rows_where,
    take,
    uniform,
)

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as torchvision and Pillow weigh
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_STEPS = 4
_RGB = 3


class FusedColorJitter(FusedOperation, IntensityAugmentationBase2D):
    """Jitter the colours in an order drawn for each image, and turn some images grey.

    Brightness, contrast, saturation and grayscale are one map of the colour channels,
    ``x -> gain * x + share * grey(x) + weight * mean(grey(x))``, with other numbers for each; so a batch goes through
    its four steps together although each image has an order of its own. Values are cut to 0..1 after each step, as
    torchvision's operations cut them: skipping the cuts would make one single map of all steps, but lets a bright
    image come out white where the contrast should have brought it back. The hue is HSV's. The result therefore equals
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
        """Draw ``factors`` ``(B, 4)``, ``order`` ``(B, 4)``, ``jittered`` ``(B,)`` and ``gray`` ``(B,)``."""
        numbers = uniform(batch, 10)
        ranges = [self._range(spread) for spread in (self.brightness, self.contrast, self.saturation)]
        if self.additive_brightness:
            ranges[_BRIGHTNESS] = (-self.brightness, self.brightness)
        low, high = np.array([*ranges, (-self.hue, self.hue)], dtype=np.float32).T
        return {
            "factors": low + (high - low) * numbers[:, :4],
            "order": numbers[:, 4:8].argsort(axis=1),
            "jittered": numbers[:, 8] < self.probability,
            "gray": numbers[:, 9] < self.grayscale,
        }

    @staticmethod
    def _range(spread: float) -> tuple[float, float]:
        return max(0.0, 1 - spread), 1 + spread

    def sort_key(self, draw: Draw) -> NDArray[np.int64]:
        """Put images side by side whose hue is shifted in the same step; those without a jitter come last."""
        step = (draw["order"] == _HUE).argmax(axis=1)
        return np.where(draw["jittered"], step, _STEPS)

    def prepare(self, draw: Draw) -> Plan:
        """Return the numbers of the map for each step, ``(steps, B)``, and the rows whose hue or grey is due."""
        order, jittered = draw["order"].T, draw["jittered"]
        gain, share, weight, offset = (np.full(order.shape, value, np.float32) for value in (1, 0, 0, 0))
        plan: Plan = {"gain": gain, "share": share, "weight": weight, "offset": offset}
        plan |= {"luma": np.array([LUMA], np.float32), "gray": rows_where(draw["gray"])}
        for kind, spread in enumerate((self.brightness, self.contrast, self.saturation)):
            if spread > 0:
                when = np.nonzero((order == kind) & jittered)  # steps and rows
                factor = draw["factors"][when[1], kind]
                if kind == _BRIGHTNESS and self.additive_brightness:
                    offset[when] = factor
                    continue
                gain[when] = factor
                if kind != _BRIGHTNESS:
                    (weight if kind == _CONTRAST else share)[when] = 1 - factor
        for step in range(_STEPS):
            hued = (order[step] == _HUE) & jittered & (self.hue > 0)
            plan |= {f"hued{step}": rows_where(hued), f"turns{step}": draw["factors"][hued, _HUE]}
        plan["any_share"], plan["any_weight"] = share.any(axis=1).tolist(), weight.any(axis=1).tolist()
        plan["any_step"] = ((gain != 1).any(axis=1) | offset.any(axis=1)).tolist()
        drawn = np.flatnonzero(jittered)
        plan["last"] = int(drawn[-1]) + 1 if len(drawn) else 0
        return plan

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Jitter and turn grey in place."""
        self._check_channels(images.shape[1])
        images = images.contiguous()
        luma = plan["luma"] if images.shape[1] == _RGB else torch.full_like(plan["luma"][:, :1], 1 / images.shape[1])
        luma = luma.to(images.dtype).expand(1, images.shape[1])
        if self.gray_first:
            self._turn_gray_(images, plan, luma)
        jittered = images[: plan["last"]]
        for step in range(_STEPS):
            if plan["any_step"][step]:
                self._map_(jittered, plan, step, luma)
            rows = plan[f"hued{step}"]
            if images.shape[1] == _RGB and not is_empty(rows):
                chosen = take(images, rows)
                put_back_(images, rows, shift_hue_(chosen, plan[f"turns{step}"].to(images.dtype)))
        if not self.gray_first:
            self._turn_gray_(images, plan, luma)
        return images

    @staticmethod
    def _map_(images: Tensor, plan: Plan, step: int, luma: Tensor) -> None:
        """Apply one step of brightness, contrast and saturation in place, and cut to 0..1."""
        flat = images.flatten(2)  # (B, C, HW), a view: images are contiguous

        def number(name: str) -> Tensor:
            return cast("Tensor", plan[name][step, : len(flat)].to(images.dtype)[:, None, None])

        added = number("offset")
        if plan["any_share"][step] or plan["any_weight"][step]:
            gray = torch.matmul(luma, flat)  # (B, 1, HW)
            if plan["any_weight"][step]:
                added = added + gray.mean(-1, keepdim=True) * number("weight")
            if plan["any_share"][step]:
                added = gray.mul_(number("share")).add_(added)
        torch.addcmul(added, flat, number("gain"), out=flat).clamp_(0, 1)

    @staticmethod
    def _turn_gray_(images: Tensor, plan: Plan, luma: Tensor) -> None:
        if images.shape[1] == _RGB and not is_empty(plan["gray"]):
            chosen = take(images, plan["gray"])
            gray = torch.matmul(luma, chosen.flatten(2)).view(-1, 1, *images.shape[2:])
            put_(images, plan["gray"], gray.expand_as(chosen))

    def _check_channels(self, channels: int) -> None:
        needs_rgb = self.saturation > 0 or self.hue > 0 or self.grayscale > 0
        require(
            channels in (1, _RGB) or not needs_rgb,
            "images",
            "have 3 channels for saturation, hue and grayscale",
            channels,
            "Set those to 0, which leaves brightness and contrast, or give the policy `color=False`",
        )
