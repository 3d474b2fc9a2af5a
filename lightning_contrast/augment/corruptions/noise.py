"""Noises: Gaussian, shot, impulse and speckle."""

import torch
from torch import Tensor

from lightning_contrast.augment.corruptions.draws import ImageDraws


def gaussian_noise(images: Tensor, sigma: float, draws: ImageDraws) -> Tensor:
    """Add Gaussian noise to images ``(B, C, H, W)`` in 0..1."""
    return images + sigma * draws.normal(*images.shape[1:])


def shot_noise(images: Tensor, photons: float, draws: ImageDraws) -> Tensor:
    """Replace pixels of images ``(B, C, H, W)`` by Poisson numbers, ``photons`` at white."""
    return draws.poisson(images * photons) / photons


def impulse_noise(images: Tensor, amount: float, draws: ImageDraws) -> Tensor:
    """Set a share of the values of images ``(B, C, H, W)`` to 0 or 1, as scikit-image's salt and pepper."""
    changed = draws.uniform(0, 1, *images.shape[1:]) <= amount
    white = draws.uniform(0, 1, *images.shape[1:]) <= 0.5
    return torch.where(changed, white.to(images.dtype), images)


def speckle_noise(images: Tensor, sigma: float, draws: ImageDraws) -> Tensor:
    """Multiply images ``(B, C, H, W)`` in 0..1 by 1 plus Gaussian noise."""
    return images + images * sigma * draws.normal(*images.shape[1:])
