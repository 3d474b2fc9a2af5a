"""Fused view operations: the distributions of the published pipelines in fewer passes over the pixels.

Each operation implements the interface of Kornia and so works inside ``kornia.augmentation.AugmentationSequential`` as
well as in the policies of `lightning_contrast.augment`. Kornia is imported when the first operation is looked up.
"""

from typing import TYPE_CHECKING

from lightning_contrast._lazy import attach

if TYPE_CHECKING:
    from lightning_contrast.augment.fused.blur import FusedGaussianBlur as FusedGaussianBlur
    from lightning_contrast.augment.fused.color import FusedColorJitter as FusedColorJitter
    from lightning_contrast.augment.fused.crop import FusedResizedCrop as FusedResizedCrop
    from lightning_contrast.augment.fused.solarize import FusedSolarize as FusedSolarize

__getattr__, __dir__, __all__ = attach(__name__, __file__)
