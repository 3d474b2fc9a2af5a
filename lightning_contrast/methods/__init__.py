"""One LightningModule a file: each is a method as its paper has it."""

from typing import TYPE_CHECKING

from lightning_contrast._lazy import attach

if TYPE_CHECKING:
    from lightning_contrast.methods.align_uniform import AlignUniform as AlignUniform
    from lightning_contrast.methods.barlow_twins import BarlowTwins as BarlowTwins
    from lightning_contrast.methods.base import SelfSupervisedModule as SelfSupervisedModule
    from lightning_contrast.methods.byol import BYOL as BYOL
    from lightning_contrast.methods.dino import DINO as DINO
    from lightning_contrast.methods.dinov2 import DINOv2 as DINOv2
    from lightning_contrast.methods.ibot import IBOT as IBOT
    from lightning_contrast.methods.ijepa import IJEPA as IJEPA
    from lightning_contrast.methods.mochi import MoCHi as MoCHi
    from lightning_contrast.methods.moco import MoCo as MoCo
    from lightning_contrast.methods.moco_v3 import MoCoV3 as MoCoV3
    from lightning_contrast.methods.msn import MSN as MSN
    from lightning_contrast.methods.nnclr import NNCLR as NNCLR
    from lightning_contrast.methods.npid import NPID as NPID
    from lightning_contrast.methods.siamese import SiameseMargin as SiameseMargin
    from lightning_contrast.methods.simclr import SimCLR as SimCLR
    from lightning_contrast.methods.simsiam import SimSiam as SimSiam
    from lightning_contrast.methods.spectral import SpectralContrastive as SpectralContrastive
    from lightning_contrast.methods.supcon import SupCon as SupCon
    from lightning_contrast.methods.swav import SwAV as SwAV
    from lightning_contrast.methods.triplet import Triplet as Triplet
    from lightning_contrast.methods.vicreg import VICReg as VICReg

__getattr__, __dir__, __all__ = attach(__name__, __file__)
