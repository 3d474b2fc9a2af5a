"""Fused view operations: the distributions of the published pipelines in fewer passes over the pixels.

Each operation implements the interface of Kornia and so works inside ``kornia.augmentation.AugmentationSequential`` as
well as in the policies of `lightning_contrast.augment`. Kornia is imported when the first operation is looked up.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
