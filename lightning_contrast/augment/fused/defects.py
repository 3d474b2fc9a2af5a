"""Random defects of surfaces: pasted patches and scars, scratches and dents."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
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


def _distances(images: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far below and right of a place ``(n, 1, 1)`` pixels are, ``(n, H, 1)`` and ``(n, 1, W)``."""
    down = torch.arange(images.shape[2], dtype=torch.float32, device=images.device)[:, None] + 0.5 - row
    across = torch.arange(images.shape[3], dtype=torch.float32, device=images.device) + 0.5 - column
    return down, across


class FusedCutPaste(FusedOperation, IntensityAugmentationBase2D):
    """Copy a box of the image to another place of it, with probability ``p`` per image: the defect of CutPaste.

    A ``"patch"`` has a share of the area from U(0.02, 0.15) and a width / height from 0.3..3.3 (log-uniform); a
    ``"scar"`` is 2..16 by 10..25 pixels of 256 and turned by up to 45 degrees. Brightness and contrast of the copy vary
    by ``jitter``.

    Source: https://arxiv.org/abs/2104.04015. Difference: the paper jitters saturation and hue of the copy, too.

    Args:
        p: Probability per image.
        kind: ``"patch"`` or ``"scar"``.
        jitter: Strength of brightness and contrast of the copy, in 0..1.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1.
    """

    def __init__(
        self,
        p: float = 1.0,
        kind: Literal["patch", "scar"] = "patch",
        *,
        jitter: float = 0.1,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("p", p)
        check_choice("kind", kind, ("patch", "scar"))
        check_probability("jitter", jitter)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.probability, self.kind, self.jitter, self.backend = p, kind, jitter, backend
        self.flags = {"probability": p, "kind": kind, "jitter": jitter}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``pasted`` ``(B,)`` and ``numbers`` ``(B, 10)``.

        Those are the rows and columns of the centers of copy and source, half of height and width in pixels, cosine and
        sine of the turn, brightness and contrast.
        """
        numbers = uniform(batch, 10).astype(np.float64)
        if self.kind == "patch":
            area = height * width * (0.02 + 0.13 * numbers[:, 1])
            aspect = np.exp(np.log(0.3) + (np.log(3.3) - np.log(0.3)) * numbers[:, 2])
            tall, wide = np.sqrt(area / aspect), np.sqrt(area * aspect)
            angle = np.zeros(batch)
        else:
            unit = min(height, width) / 256
            tall, wide = (10 + 15 * numbers[:, 1]) * unit, (2 + 14 * numbers[:, 2]) * unit
            angle = np.radians(45) * (2 * numbers[:, 3] - 1)
        tall, wide = np.clip(np.rint(tall), 1, height), np.clip(np.rint(wide), 1, width)
        places = []
        for first in (4, 6):
            for number, edge, length in ((numbers[:, first], height, tall), (numbers[:, first + 1], width, wide)):
                corner = np.minimum(np.floor(number * (edge - length + 1)), edge - length)
                places.append(corner + length / 2)
        jitter = 1 + self.jitter * (2 * numbers[:, 8:] - 1)
        drawn = [*places, tall / 2, wide / 2, np.cos(angle), np.sin(angle), *jitter.T]
        return {"pasted": numbers[:, 0] < self.chance, "numbers": np.stack(drawn, axis=1).astype(np.float32)}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to change and their numbers ``(10, n, 1, 1)``."""
        numbers = draw["numbers"][draw["pasted"]].T[:, :, None, None]
        return {"rows": rows_where(draw["pasted"]), "numbers": np.ascontiguousarray(numbers)}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Paste into rows of ``images`` ``(B, C, H, W)`` in place."""
        if not is_empty(plan["rows"]):
            height, width = images.shape[2:]
            row, column, from_row, from_column, half_h, half_w, cos, sin, bright, contrast = plan["numbers"].unbind(0)
            chosen = take(images, plan["rows"])
            down, across = _distances(images, row, column)
            right, below = cos * across + sin * down, cos * down - sin * across  # in the copy's own axes
            grid = torch.stack([(right + from_column) * (2 / width) - 1, (below + from_row) * (2 / height) - 1], dim=-1)
            copy = F.grid_sample(chosen, grid.to(images.dtype), padding_mode="border", align_corners=False)
            inside = ((right.abs() < half_w) & (below.abs() < half_h))[:, None]
            copy = copy * bright[:, None].to(images.dtype)
            mean = (copy * inside).mean((1, 2, 3), keepdim=True) / inside.to(images.dtype).mean((1, 2, 3), keepdim=True)
            copy = mean + (copy - mean) * contrast[:, None].to(images.dtype)
            put_(images, plan["rows"], torch.where(inside, copy.clamp_(0, 1), chosen))
        return images


class FusedScratch(FusedOperation, IntensityAugmentationBase2D):
    """Draw a straight scratch, brighter or darker than the surface, with probability ``p`` per image.

    Args:
        p: Probability per image.
        length: Range of the length as a share of the shorter edge, above 0, at most 1.
        width: Range of the width as a share of the shorter edge, above 0, at most 1; at least one pixel is touched.
        contrast: Range of what is added or subtracted, in 0..1.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1.
    """

    def __init__(
        self,
        p: float = 1.0,
        length: tuple[float, float] = (0.1, 0.5),
        width: tuple[float, float] = (0.004, 0.012),
        contrast: tuple[float, float] = (0.2, 0.6),
        *,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("p", p)
        for name, values in (("length", length), ("width", width), ("contrast", contrast)):
            check_range(name, values, 0.0, 1.0)
            require(
                name == "contrast" or values[0] > 0, name, "start above 0", tuple(values), "Give a share of the edge"
            )
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.probability, self.backend = p, backend
        self.ranges = np.array([length, width, contrast])
        self.flags = {"probability": p}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``scratched`` ``(B,)`` and ``numbers`` ``(B, 7)``.

        Those are row and column of the center, cosine and sine of the direction, half of length and width in pixels,
        and what is added.
        """
        numbers = uniform(batch, 8).astype(np.float64)
        low, high = self.ranges.T
        length, wide, contrast = (low + (high - low) * numbers[:, 1:4]).T
        edge, angle = min(height, width), np.pi * numbers[:, 4]
        added = np.where(numbers[:, 7] < 0.5, contrast, -contrast)
        drawn = [numbers[:, 5] * height, numbers[:, 6] * width, np.cos(angle), np.sin(angle)]
        drawn += [length * edge / 2, wide * edge / 2, added]
        return {"scratched": numbers[:, 0] < self.chance, "numbers": np.stack(drawn, axis=1).astype(np.float32)}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to change and their numbers ``(7, n, 1, 1)``."""
        numbers = draw["numbers"][draw["scratched"]].T[:, :, None, None]
        return {"rows": rows_where(draw["scratched"]), "numbers": np.ascontiguousarray(numbers)}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Scratch rows of ``images`` ``(B, C, H, W)`` in place."""
        if not is_empty(plan["rows"]):
            row, column, cos, sin, half_length, half_width, added = plan["numbers"].unbind(0)
            down, across = _distances(images, row, column)
            along, beside = cos * across + sin * down, cos * down - sin * across
            beyond = (along.abs() - half_length).clamp_(min=0)
            share = (half_width + 0.5 - torch.hypot(beyond, beside)).clamp_(0, 1)  # of a pixel that is scratched
            change = (added * share)[:, None].to(images.dtype)
            put_(images, plan["rows"], (take(images, plan["rows"]) + change).clamp_(0, 1))
        return images


class FusedDent(FusedOperation, IntensityAugmentationBase2D):
    """Shade a dent: bright on one side and dark on the other, as under light from the side, at ``p`` per image.

    The slope of a Gaussian along a random direction is added, with ``contrast`` as its largest value.

    Args:
        p: Probability per image.
        radius: Range of the standard deviation as a share of the shorter edge, above 0, at most 1.
        contrast: Range of the largest value that is added and subtracted, in 0..1.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1.
    """

    def __init__(
        self,
        p: float = 1.0,
        radius: tuple[float, float] = (0.02, 0.08),
        contrast: tuple[float, float] = (0.2, 0.5),
        *,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("p", p)
        check_range("radius", radius, 1e-3, 1.0)
        check_range("contrast", contrast, 0.0, 1.0)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.probability, self.backend = p, backend
        self.ranges = np.array([radius, contrast])
        self.flags = {"probability": p}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``dented`` ``(B,)`` and ``numbers`` ``(B, 6)``.

        Those are row and column of the center, cosine and sine of the direction, the radius in pixels and the contrast.
        """
        numbers = uniform(batch, 6).astype(np.float64)
        low, high = self.ranges.T
        radius, contrast = (low + (high - low) * numbers[:, 1:3]).T
        angle = 2 * np.pi * numbers[:, 3]
        drawn = [numbers[:, 4] * height, numbers[:, 5] * width, np.cos(angle), np.sin(angle)]
        drawn += [radius * min(height, width), contrast]
        return {"dented": numbers[:, 0] < self.chance, "numbers": np.stack(drawn, axis=1).astype(np.float32)}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to change and their numbers ``(6, n, 1, 1)``."""
        numbers = draw["numbers"][draw["dented"]].T[:, :, None, None]
        return {"rows": rows_where(draw["dented"]), "numbers": np.ascontiguousarray(numbers)}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Dent rows of ``images`` ``(B, C, H, W)`` in place."""
        if not is_empty(plan["rows"]):
            row, column, cos, sin, radius, contrast = plan["numbers"].unbind(0)
            down, across = (distance / radius for distance in _distances(images, row, column))
            slope = (cos * across + sin * down) * (0.5 - (down.square() + across.square()) / 2).exp()
            change = (contrast * slope)[:, None].to(images.dtype)
            put_(images, plan["rows"], (take(images, plan["rows"]) + change).clamp_(0, 1))
        return images
