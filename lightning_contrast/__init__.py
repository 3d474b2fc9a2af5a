"""Contrastive and self-supervised pretraining for PyTorch Lightning."""

import lazy_loader

from lightning_contrast._version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
