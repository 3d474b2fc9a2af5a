"""Random vertical flip and quarter turns."""

from typing import Any

import numpy as np
import torch
from kornia.augmentation import GeometricAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_choice, check_probability, require
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

_TURNS = 4


class FusedTurn(FusedOperation, GeometricAugmentationBase2D):
    """Flip upside down, then turn by 0, 90, 180 or 270 degrees: every pixel keeps its value.

    Equals ``torch.rot90`` of the flipped image. Kornia's ``RandomRotation90`` resamples the images, and rounds a
    uniform number of turns, so that the first and the last are half as likely as those between.

    Args:
        vertical_flip: Probability of the flip per image.
        quarter_turns: Draw the turn of each image, all four equally likely; False leaves the images as they are.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)``; H equals W with quarter turns.
    """

    moves_pixels = True

    def __init__(
        self,
        vertical_flip: float = 0.5,
        *,
        quarter_turns: bool = True,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("vertical_flip", vertical_flip)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.vertical_flip, self.quarter_turns, self.backend = vertical_flip, quarter_turns, backend
        self.flags = {"vertical_flip": vertical_flip, "quarter_turns": quarter_turns}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``turns`` ``(B,)``, 0 to 3 counterclockwise, and ``upside_down`` ``(B,)``, the flip before them."""
        hint = "Crop them to squares first, or set `quarter_turns=False`"
        require(height == width or not self.quarter_turns, "images", "be square", (height, width), hint)
        numbers = uniform(batch, 2)
        turns = np.minimum(numbers[:, 0] * _TURNS, _TURNS - 1).astype(np.int64) * self.quarter_turns
        return {"turns": turns, "upside_down": numbers[:, 1] < self.vertical_flip}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows of each of the seven changes of orientation, named by flip and number of turns."""
        kind = draw["turns"] + _TURNS * draw["upside_down"]
        return {f"rows{number}": rows_where(kind == number) for number in range(1, 2 * _TURNS)}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Flip and turn rows of ``images`` ``(B, C, H, W)`` in place."""
        for number in range(1, 2 * _TURNS):
            rows = plan[f"rows{number}"]
            if not is_empty(rows):
                chosen = take(images, rows)
                chosen = chosen.flip(-2) if number >= _TURNS else chosen
                put_(images, rows, torch.rot90(chosen, number % _TURNS, (-2, -1)))
        return images

    def compute_transformation(self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any]) -> Tensor:
        """Return the matrices ``(B, 3, 3)`` from image to view coordinates in pixels (a hook of Kornia)."""
        last_row, last_column = input.shape[-2] - 1, input.shape[-1] - 1
        quarter = np.array([[0, 1, 0], [-1, 0, last_column], [0, 0, 1]], np.float32)
        flip = np.array([[1, 0, 0], [0, -1, last_row], [0, 0, 1]], np.float32)
        turned = [np.linalg.matrix_power(quarter, turns) for turns in range(_TURNS)]
        matrices = torch.from_numpy(np.stack(turned + [matrix @ flip for matrix in turned]))
        return matrices[params["turns"] + _TURNS * params["upside_down"]].to(input)
