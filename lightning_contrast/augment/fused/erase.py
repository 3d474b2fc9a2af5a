"""Random erasing."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_choice, check_probability, check_range, require
from lightning_contrast.augment.fused.base import (
    Backend,
    Draw,
    FusedOperation,
    Plan,
    is_empty,
    put_,
    rows_where,
    take,
    uniform,
)

_TRIES = 10


class FusedErase(FusedOperation, IntensityAugmentationBase2D):
    """Replace a random box by a constant, with probability ``p`` per image.

    The box is drawn as in torchvision's ``RandomErasing``: the first of ten pairs of area and aspect ratio that is
    smaller than the image; if none is, the image stays. Kornia's ``RandomErasing`` draws the ratio from two uniform
    halves, has one constant for all channels and computes every image.

    Source: https://arxiv.org/abs/1708.04896.

    Args:
        p: Probability per image.
        scale: Range of the box's share of the image area, in (0, 1].
        ratio: Range of height / width, above 0; drawn log-uniformly.
        fill: Value of the box, one number per channel; its mean makes it 0 after the normalization. None for 0.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)``.
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        *,
        fill: Sequence[float] | None = None,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("p", p)
        check_range("scale", scale, 0.0, 1.0)
        require(scale[0] > 0, "scale", "start above 0", tuple(scale), "Give the smallest share of the area")
        check_range("ratio", ratio, 0.0, math.inf)
        require(ratio[0] > 0, "ratio", "start above 0", tuple(ratio), "Give height / width, such as (0.3, 3.3)")
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.probability, self.scale, self.ratio, self.backend = p, tuple(scale), tuple(ratio), backend
        self.fill = None if fill is None else [float(value) for value in fill]
        self.flags = {"probability": p, "scale": self.scale, "ratio": self.ratio}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``box`` ``(B, 4)``: top, left, height and width in pixels; the height is 0 of images that stay."""
        numbers = uniform(batch, 2 * _TRIES + 3).astype(np.float64)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * numbers[:, :_TRIES])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = np.exp(low + (high - low) * numbers[:, _TRIES : 2 * _TRIES])
        tall, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (tall >= 1) & (wide >= 1) & (tall < height) & (wide < width)
        rows, first = np.arange(batch), fits.argmax(axis=1)
        tall, wide = tall[rows, first], wide[rows, first]
        top = np.floor(numbers[:, -3] * (height - tall + 1))
        left = np.floor(numbers[:, -2] * (width - wide + 1))
        erased = (numbers[:, -1] < self.chance) & fits[rows, first]
        box = np.stack([np.minimum(top, height - tall), np.minimum(left, width - wide), tall * erased, wide], axis=1)
        return {"box": box.astype(np.float32)}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to change, their boxes ``(4, n, 1, 1, 1)`` and the constants ``(1, C, 1, 1)``."""
        chosen = draw["box"][:, 2] > 0
        fill = np.array([0.0] if self.fill is None else self.fill, np.float32).reshape(1, -1, 1, 1)
        box = draw["box"][chosen].T[:, :, None, None, None]
        return {"rows": rows_where(chosen), "box": np.ascontiguousarray(box), "fill": fill}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Erase boxes in rows of ``images`` ``(B, C, H, W)`` in place."""
        channels = images.shape[1]
        fits = self.fill is None or len(self.fill) in (1, channels)
        require(
            fits, "fill", f"have {channels} numbers, one per channel", self.fill, "Give as many numbers as channels"
        )
        if not is_empty(plan["rows"]):
            top, left, tall, wide = plan["box"].unbind(0)
            down = torch.arange(images.shape[2], device=images.device, dtype=torch.float32)[:, None] - top
            across = torch.arange(images.shape[3], device=images.device, dtype=torch.float32) - left
            inside = (down >= 0) & (down < tall) & (across >= 0) & (across < wide)
            put_(images, plan["rows"], torch.where(inside, plan["fill"].to(images.dtype), take(images, plan["rows"])))
        return images
