"""One LightningModule a file: each is a method as its paper has it."""

from typing import TYPE_CHECKING

from lightning_contrast._lazy import attach

if TYPE_CHECKING:
    from lightning_contrast.methods.base import ContrastiveModule as ContrastiveModule
    from lightning_contrast.methods.simclr import SimCLR as SimCLR

__getattr__, __dir__, __all__ = attach(__name__, __file__)
