"""Fused view operations: the same distributions as the published pipelines in fewer passes over the pixels.

Each operation follows the interface of Kornia: it works inside ``kornia.augmentation.AugmentationSequential`` as
well as in the policies of `lightning_contrast.augment`. Importing this package imports Kornia.
"""

from lightning_contrast.augment.fused.blur import FusedGaussianBlur
from lightning_contrast.augment.fused.color import FusedColorJitter
from lightning_contrast.augment.fused.crop import FusedResizedCrop
from lightning_contrast.augment.fused.solarize import FusedSolarize

__all__ = ["FusedColorJitter", "FusedGaussianBlur", "FusedResizedCrop", "FusedSolarize"]
