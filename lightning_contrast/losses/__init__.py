"""Loss functions: pure functions of tensors, over the global batch of all ranks, in full precision under autocast."""

from lightning_contrast.losses.bilinear import bilinear_loss
from lightning_contrast.losses.clustering import msn_loss, sinkhorn, swav_loss
from lightning_contrast.losses.contrastive import (
    debiased_nt_xent,
    decoupled_nt_xent,
    hard_negative_nt_xent,
    info_nce,
    nt_xent,
    sup_con,
)
from lightning_contrast.losses.distillation import dino_loss, ibot_patch_loss, ijepa_loss, koleo_loss, masked_patch_loss
from lightning_contrast.losses.geometric import (
    alignment,
    margin_contrastive_loss,
    spectral_contrastive_loss,
    triplet_loss,
    uniformity,
)
from lightning_contrast.losses.image_text import clip_loss, siglip_loss
from lightning_contrast.losses.negatives import Negatives
from lightning_contrast.losses.predictive import byol_loss, moco_v3_loss, negative_cosine
from lightning_contrast.losses.redundancy import barlow_twins_loss, vicreg_loss
from lightning_contrast.losses.synthetic import mochi_negatives

__all__ = [
    "Negatives",
    "alignment",
    "barlow_twins_loss",
    "bilinear_loss",
    "byol_loss",
    "clip_loss",
    "debiased_nt_xent",
    "decoupled_nt_xent",
    "dino_loss",
    "hard_negative_nt_xent",
    "ibot_patch_loss",
    "ijepa_loss",
    "info_nce",
    "koleo_loss",
    "margin_contrastive_loss",
    "masked_patch_loss",
    "mochi_negatives",
    "moco_v3_loss",
    "msn_loss",
    "negative_cosine",
    "nt_xent",
    "siglip_loss",
    "sinkhorn",
    "spectral_contrastive_loss",
    "sup_con",
    "swav_loss",
    "triplet_loss",
    "uniformity",
    "vicreg_loss",
]
