"""Random jitter of the stains of histology."""

import numpy as np
import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_choice, check_not_negative, check_probability, require
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
from lightning_contrast.augment.stains import ABSORPTION, SEPARATION, mix, separate


class FusedStainJitter(FusedOperation, IntensityAugmentationBase2D):
    """Change the amounts of hematoxylin, eosin and DAB, drawn per image and stain, with probability ``p`` per image.

    Each stain becomes ``stain * U(1 - scale, 1 + scale) + U(-shift, shift)``; see `stain_jitter`. Kornia has no stains.

    Args:
        scale: Strength of the factor, in 0..1.
        shift: Largest amount added or removed, >= 0, in the units of `rgb_to_hed`.
        p: Probability per image.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: RGB ``(B, 3, H, W)`` in 0..1.
    """

    def __init__(
        self,
        scale: float = 0.1,
        shift: float = 0.01,
        *,
        p: float = 1.0,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("scale", scale)
        check_not_negative("shift", shift)
        check_probability("p", p)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.scale, self.shift, self.probability, self.backend = scale, shift, p, backend
        self.flags = {"probability": p, "scale": scale, "shift": shift}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``jittered`` ``(B,)``, ``factor`` ``(B, 3)`` and ``amount`` ``(B, 3)``."""
        numbers = uniform(batch, 7)
        centered = 2 * numbers[:, 1:] - 1
        return {
            "jittered": numbers[:, 0] < self.chance,
            "factor": 1 + self.scale * centered[:, :3],
            "amount": self.shift * centered[:, 3:],
        }

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to jitter, their factors and amounts ``(n, 3, 1, 1)``, and the matrices ``(3, 3)``."""
        chosen = draw["jittered"]
        return {
            "rows": rows_where(chosen),
            "factor": draw["factor"][chosen][:, :, None, None].astype(np.float32),
            "amount": draw["amount"][chosen][:, :, None, None].astype(np.float32),
            "separation": np.array(SEPARATION, np.float32),
            "absorption": np.array(ABSORPTION, np.float32),
        }

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Jitter rows of ``images`` ``(B, 3, H, W)`` in place."""
        hint = "Give RGB images, or leave the stain jitter out"
        require(images.shape[1] == 3, "images", "have 3 channels for the stain jitter", images.shape[1], hint)
        if not is_empty(plan["rows"]):
            dtype = images.dtype
            stains = separate(take(images, plan["rows"]), plan["separation"].to(dtype))
            stains = torch.addcmul(plan["amount"].to(dtype), stains, plan["factor"].to(dtype))
            put_(images, plan["rows"], mix(stains, plan["absorption"].to(dtype)))
        return images
