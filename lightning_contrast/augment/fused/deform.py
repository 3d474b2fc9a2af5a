"""Random rotation and smooth deformation in one resampling."""

import numpy as np
import torch.nn.functional as F
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, check_interval, check_probability
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


class FusedDeform(FusedOperation, IntensityAugmentationBase2D):
    """Rotate by U(-degrees, degrees) and deform by a smooth random field in one bilinear resampling.

    The field has ``points x points`` control points, of which each moves by up to ``displacement`` of the edge along
    either axis, independently and uniformly; between them it is interpolated bicubically. Pixels beyond the border
    repeat it. Kornia's ``RandomElasticTransform`` draws and transfers two numbers for each pixel.

    Args:
        degrees: Limit of the angle, 0..180.
        displacement: Limit of the displacement of a control point, as a share of the edge; 0..0.5.
        points: Number of control points along each axis, >= 2.
        p: Probability per image.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)``.
    """

    moves_pixels = True

    def __init__(
        self,
        degrees: float = 10.0,
        displacement: float = 0.02,
        *,
        points: int = 7,
        p: float = 1.0,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_interval("degrees", degrees, "[0, 180]", "Give the largest angle")
        hint = "Give a share of the edge, such as 0.02"
        check_interval("displacement", displacement, "[0, 0.5]", hint)
        check_at_least("points", points, 2)
        check_probability("p", p)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.degrees, self.displacement, self.points = degrees, displacement, points
        self.probability, self.backend = p, backend
        self.flags = {"probability": p, "degrees": degrees}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``deformed``, ``angle`` in radians and ``aspect`` ``(B,)``, and ``field`` ``(B, 2, P, P)`` in edges."""
        numbers = uniform(batch, 2 + 2 * self.points**2)
        field = (2 * numbers[:, 2:] - 1) * self.displacement
        return {
            "deformed": numbers[:, 0] < self.chance,
            "angle": (2 * numbers[:, 1] - 1) * np.float32(np.radians(self.degrees)),
            "field": field.reshape(batch, 2, self.points, self.points).astype(np.float32),
            "aspect": np.full(batch, height / width, np.float32),
        }

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to deform, their matrices ``(n, 2, 3)`` and fields ``(n, 2, P, P)``."""
        chosen = draw["deformed"]
        cos, sin = np.cos(draw["angle"][chosen]), np.sin(draw["angle"][chosen])
        zero = np.zeros_like(cos)
        aspect = draw["aspect"][chosen]  # the axes of the grid are -1..1 at any height and width
        matrix = (
            np.stack([cos, -sin * aspect, zero, sin / aspect, cos, zero], axis=1).reshape(-1, 2, 3).astype(np.float32)
        )
        return {"rows": rows_where(chosen), "matrix": matrix, "field": 2 * draw["field"][chosen]}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Deform rows of ``images`` ``(B, C, H, W)`` in place."""
        if not is_empty(plan["rows"]):
            chosen = take(images, plan["rows"])
            shape, dtype = chosen.shape[-2:], images.dtype
            grid = F.affine_grid(plan["matrix"].to(dtype), list(chosen.shape), align_corners=False)
            field = F.interpolate(plan["field"].to(dtype), shape, mode="bicubic", align_corners=True)
            moved = F.grid_sample(chosen, grid + field.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
            put_(images, plan["rows"], moved)
        return images
