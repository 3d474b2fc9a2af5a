"""Random smooth fields over the image: uneven light, and clouds or fog."""

import numpy as np
import torch
import torch.nn.functional as F
from kornia.augmentation import IntensityAugmentationBase2D
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast._checks import (
    check_at_least,
    check_choice,
    check_not_negative,
    check_positive,
    check_probability,
    check_range,
)
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


def smooth_field(points: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return fields ``(n, 1, H, W)`` that go through control points ``(n, P, P)``, bicubic between them."""
    return F.interpolate(points[:, None], shape, mode="bicubic", align_corners=True)


class FusedShading(FusedOperation, IntensityAugmentationBase2D):
    """Multiply by a smooth random field, with probability ``p`` per image, and clip to 0..1.

    The field is the exponential of ``points x points`` control points from U(-strength, strength), interpolated
    bicubically: uneven illumination, or the bias field of an MRI coil. With two points per axis it is a gradient.
    Kornia's ``RandomLinearIllumination`` and ``RandomGaussianIllumination`` add a field of full resolution, which they
    compute on the host and transfer: 154 MB for 256 images of 224 pixels.

    Args:
        p: Probability per image.
        strength: Limit of the logarithm of the factor, >= 0; 0.3 is a factor of 0.74 to 1.35.
        points: Number of control points along each axis, >= 2.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1; all channels have the same factor.
    """

    def __init__(
        self,
        p: float = 0.5,
        strength: float = 0.3,
        *,
        points: int = 3,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("p", p)
        check_not_negative("strength", strength)
        check_at_least("points", points, 2)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.probability, self.strength, self.points, self.backend = p, strength, points, backend
        self.flags = {"probability": p, "strength": strength}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``shaded`` ``(B,)`` and ``field`` ``(B, P, P)``, the logarithm of the factor."""
        numbers = uniform(batch, 1 + self.points**2)
        field = (2 * numbers[:, 1:] - 1) * np.float32(self.strength)
        return {
            "shaded": numbers[:, 0] < self.chance,
            "field": field.reshape(batch, self.points, self.points),
        }

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to shade and their fields ``(n, P, P)``."""
        return {"rows": rows_where(draw["shaded"]), "field": draw["field"][draw["shaded"]]}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Shade rows of ``images`` ``(B, C, H, W)`` in place."""
        if not is_empty(plan["rows"]):
            factor = smooth_field(plan["field"], (images.shape[2], images.shape[3])).exp_().to(images.dtype)
            put_(images, plan["rows"], (take(images, plan["rows"]) * factor).clamp_(0, 1))
        return images


class FusedCloud(FusedOperation, IntensityAugmentationBase2D):
    """Cover a part of the image by clouds, or all of it by fog, with probability ``p`` per image.

    The cover is ``alpha = opacity * clip(0.5 + (f - t) / softness, 0, 1)``, where f is a sum of smooth noise at two
    scales with a standard deviation of 1 and t the limit above which the wanted share of it lies, and the result is
    ``(1 - alpha) * image + alpha * value``. Kornia has neither clouds nor fog; its plasma operations add or scale.

    Args:
        p: Probability per image.
        cover: Range of the share of the area where the cover is at least half of its opacity, in 0..1.
        opacity: Range of the largest alpha, in 0..1.
        value: Of a cloud, in 0..1, in every channel.
        softness: Width of the edge of a cloud, in standard deviations of the noise, above 0. With a cover of 1 and a
            softness of 4 it is fog, whose density varies between about half and all of the opacity.
        points: Number of control points of the coarser noise along each axis, >= 2.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1.
    """

    def __init__(
        self,
        p: float = 0.5,
        cover: tuple[float, float] = (0.1, 0.5),
        opacity: tuple[float, float] = (0.7, 1.0),
        *,
        value: float = 1.0,
        softness: float = 1.0,
        points: int = 4,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("p", p)
        check_range("cover", cover, 0.0, 1.0)
        check_range("opacity", opacity, 0.0, 1.0)
        check_probability("value", value)
        check_positive("softness", softness)
        check_at_least("points", points, 2)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.probability, self.cover, self.opacity, self.backend = p, tuple(cover), tuple(opacity), backend
        self.value, self.softness, self.points = value, softness, points
        self.flags = {"probability": p, "cover": self.cover, "opacity": self.opacity}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``clouded`` and ``opacity`` ``(B,)``, and ``field`` ``(B, 2P, 2P)``: alpha / opacity, not clipped."""
        points = self.points
        numbers = uniform(batch, 3 + 5 * points**2)
        coarse = numbers[:, 3 : 3 + points**2].reshape(batch, points, points)
        fine = numbers[:, 3 + points**2 :].reshape(batch, 2 * points, 2 * points)
        spread = _between(points, 2 * points)
        noise = spread @ coarse @ spread.T + 0.5 * fine
        noise = (noise - noise.mean(axis=(1, 2), keepdims=True)) / noise.std(axis=(1, 2), keepdims=True)
        cover, opacity = (
            low + (high - low) * numbers[:, place] for place, (low, high) in ((1, self.cover), (2, self.opacity))
        )
        ordered = np.sort(noise.reshape(batch, -1), axis=1)
        rank = np.minimum(np.floor((1 - cover) * ordered.shape[1]), ordered.shape[1] - 1).astype(np.int64)
        limit = np.take_along_axis(ordered, rank[:, None], axis=1)[:, :, None]
        return {
            "clouded": numbers[:, 0] < self.chance,
            "opacity": opacity.astype(np.float32),
            "field": (0.5 + (noise - limit) / self.softness).astype(np.float32),
        }

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to cover, their fields ``(n, 2P, 2P)`` and opacities ``(n, 1, 1, 1)``."""
        chosen = draw["clouded"]
        opacity = draw["opacity"][chosen][:, None, None, None]
        return {"rows": rows_where(chosen), "field": draw["field"][chosen], "opacity": opacity}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Cover rows of ``images`` ``(B, C, H, W)`` in place."""
        if not is_empty(plan["rows"]):
            alpha = smooth_field(plan["field"], (images.shape[2], images.shape[3])).clamp_(0, 1).mul_(plan["opacity"])
            chosen = take(images, plan["rows"])
            white = torch.full((), self.value, dtype=images.dtype, device=images.device)
            put_(images, plan["rows"], torch.lerp(chosen, white, alpha.to(images.dtype)))
        return images


def _between(few: int, many: int) -> NDArray[np.float32]:
    """Return the matrix ``(many, few)`` of linear interpolation between equally spaced points."""
    place = np.linspace(0, few - 1, many)
    weights: NDArray[np.float32] = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(few))).astype(np.float32)
    return weights
