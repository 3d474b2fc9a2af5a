"""Random solarization."""

import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_choice, check_probability
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

_HALF = 0.5


class FusedSolarize(FusedOperation, IntensityAugmentationBase2D):
    """Invert the values at or above ``threshold``, with probability ``p`` per image.

    Equals ``torchvision.transforms.functional.solarize`` on float images; Pillow's threshold of 128 on 8-bit images
    corresponds to 0.50196, not 0.5.

    Args:
        p: Probability per image.
        threshold: Values at or above it become ``1 - value``; in 0..1.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).
    """

    def __init__(
        self, p: float = 0.2, *, threshold: float = 0.5, backend: Backend = None, keepdim: bool = False
    ) -> None:
        check_probability("p", p)
        check_probability("threshold", threshold)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.probability, self.threshold, self.backend = p, threshold, backend
        self.flags = {"probability": p, "threshold": threshold}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``solarized`` ``(B,)``, the images to solarize."""
        return {"solarized": uniform(batch, 1)[:, 0] < self.chance}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to solarize."""
        return {"rows": rows_where(draw["solarized"])}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Solarize rows of ``images`` ``(B, C, H, W)`` in place."""
        if not is_empty(plan["rows"]):
            chosen = take(images, plan["rows"])
            inverted = 1 - chosen
            if self.threshold == _HALF:
                chosen = torch.minimum(chosen, inverted)  # the same result, much faster
            else:
                chosen = torch.where(chosen >= self.threshold, inverted, chosen)
            put_(images, plan["rows"], chosen)
        return images
