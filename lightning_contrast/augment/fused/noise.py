"""Random Gaussian noise."""

import math

import numpy as np
import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_choice, check_not_negative, check_probability
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

_LOW = 0xFFFF  # the lower 16 of 32 bits
_MULTIPLIERS = (-1640531535, -2048144789, -1028477387)  # 32-bit odd constants with well mixed bits, as signed numbers


def _fold_(numbers: Tensor) -> Tensor:
    """Add the upper to the lower half of int32 ``numbers`` ``(...)`` by exclusive or, in place."""
    return numbers.bitwise_xor_((numbers >> 16).bitwise_and_(_LOW))


def normal_noise(seeds: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return standard normal numbers that are a function of a seed and the place in the image.

    A hash of the place and the seed gives two numbers of 16 bits, and Box-Muller's transform one normal number, of at
    most 4.9 standard deviations. Devices have generators of their own, but they know no seed per image, and numbers
    drawn on the host would be transferred, one for each value of the images.

    Args:
        seeds: One number per image, int32 ``(n, 1)``.
        shape: Channels, height and width.

    Returns:
        ``(n, C, H, W)``, float32.
    """
    place = torch.arange(math.prod(shape), dtype=torch.int32, device=seeds.device)
    bits = _fold_(_fold_(place.mul_(_MULTIPLIERS[0])) + seeds)
    for multiplier in _MULTIPLIERS[1:]:
        _fold_(bits.mul_(multiplier))
    radius = (bits & _LOW).float().add_(0.5).div_(_LOW + 1).log_().mul_(-2).sqrt_()
    angle = (bits >> 16).float().mul_(2 * math.pi / (_LOW + 1))
    return radius.mul_(angle.cos_()).view(-1, *shape)


class FusedGaussianNoise(FusedOperation, IntensityAugmentationBase2D):
    """Add independent Gaussian noise to every value, with probability ``p`` per image, and clip to 0..1.

    Kornia's ``RandomGaussianNoise`` draws the noise on the host and transfers it: 154 MB for 256 images of 224 pixels.
    Here one seed per image is drawn there, from which the device computes the noise; see `normal_noise`.

    Args:
        p: Probability per image.
        std: Standard deviation on the scale of pixels in 0..1, >= 0.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1.
    """

    def __init__(self, p: float = 0.5, std: float = 0.05, *, backend: Backend = None, keepdim: bool = False) -> None:
        check_probability("p", p)
        check_not_negative("std", std)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.probability, self.std, self.backend = p, std, backend
        self.flags = {"probability": p, "std": std}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``noisy`` ``(B,)`` and ``seed`` ``(B,)``, int32."""
        numbers = uniform(batch, 3).astype(np.float64)
        seed = np.floor(numbers[:, 1] * 2**16) * 2**16 + np.floor(numbers[:, 2] * 2**16) - 2**31
        return {"noisy": numbers[:, 0] < self.chance, "seed": seed.astype(np.int32)}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to change and their seeds ``(n, 1)``."""
        return {"rows": rows_where(draw["noisy"]), "seed": draw["seed"][draw["noisy"], None]}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Add noise to rows of ``images`` ``(B, C, H, W)`` in place."""
        if not is_empty(plan["rows"]) and self.std > 0:
            _, channels, height, width = images.shape
            noise = normal_noise(plan["seed"], (channels, height, width)).mul_(self.std).to(images.dtype)
            put_(images, plan["rows"], noise.add_(take(images, plan["rows"])).clamp_(0, 1))
        return images
