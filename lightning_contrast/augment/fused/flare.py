"""Random lens flare."""

import numpy as np
import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_choice, check_probability, check_range
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

_GHOSTS = 3


class FusedFlare(FusedOperation, IntensityAugmentationBase2D):
    """Add the glow of a light source and its reflections in the lens, with probability ``p`` per image.

    The source is anywhere in the image; three discs lie on the line from it through the center of the image. The
    light is added as on a screen, ``1 - (1 - image) (1 - light)``. Kornia has no flare.

    Args:
        p: Probability per image.
        strength: Range of the light at the source, in 0..1; the reflections have up to a quarter of it.
        radius: Range of the standard deviation of the glow, as a share of the shorter edge; in 0..1, above 0.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1; all channels get the same light.
    """

    def __init__(
        self,
        p: float = 0.1,
        strength: tuple[float, float] = (0.4, 0.9),
        radius: tuple[float, float] = (0.05, 0.2),
        *,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("p", p)
        check_range("strength", strength, 0.0, 1.0)
        check_range("radius", radius, 1e-3, 1.0)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.probability, self.strength, self.radius, self.backend = p, tuple(strength), tuple(radius), backend
        self.flags = {"probability": p, "strength": self.strength, "radius": self.radius}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``flared`` ``(B,)``, and ``spots`` ``(B, 4, 4)``: row, column, radius in pixels, and light of each."""
        numbers = uniform(batch, 5 + 3 * _GHOSTS).astype(np.float64)
        shape, edge = np.array([height, width]), min(height, width)
        low, high = np.array([self.strength, self.radius]).T
        light, radius = (low + (high - low) * numbers[:, 3:5]).T
        source = numbers[:, 1:3] * shape
        ghosts = numbers[:, 5:].reshape(batch, _GHOSTS, 3)
        along = 0.4 + 1.6 * ghosts[..., :1]  # 1 is the center of the image, 2 the source mirrored in it
        places = source[:, None] + along * (shape / 2 - source)[:, None]
        spots = np.empty((batch, 1 + _GHOSTS, 4))
        spots[:, 0, :2], spots[:, 0, 2], spots[:, 0, 3] = source, radius * edge, light
        spots[:, 1:, :2], spots[:, 1:, 2] = places, (0.02 + 0.06 * ghosts[..., 1]) * edge
        spots[:, 1:, 3] = light[:, None] * 0.25 * ghosts[..., 2]
        return {"flared": numbers[:, 0] < self.chance, "spots": spots.astype(np.float32)}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to change and their spots ``(4, 4, n, 1, 1, 1)``, by spot and number."""
        spots = draw["spots"][draw["flared"]].transpose(1, 2, 0)[..., None, None, None]
        return {"rows": rows_where(draw["flared"]), "spots": np.ascontiguousarray(spots)}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Add light to rows of ``images`` ``(B, C, H, W)`` in place."""
        if not is_empty(plan["rows"]):
            height, width = images.shape[2:]
            down = torch.arange(height, dtype=torch.float32, device=images.device)[:, None] + 0.5
            across = torch.arange(width, dtype=torch.float32, device=images.device) + 0.5
            dark = torch.ones((), device=images.device)
            for number, (row, column, radius, light) in enumerate(plan["spots"].unbind(0)):
                squared = (down - row).square() + (across - column).square()  # (n, 1, H, W)
                if number == 0:
                    spot = squared.div_(-2 * radius.square()).exp_()
                else:  # a disc with an edge of one pixel
                    spot = (radius + 0.5 - squared.sqrt_()).clamp_(0, 1)
                dark = dark * (1 - light * spot)
            lit = 1 - (1 - take(images, plan["rows"])) * dark.to(images.dtype)
            put_(images, plan["rows"], lit.clamp_(0, 1))
        return images
