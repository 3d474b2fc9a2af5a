"""Loss functions: pure functions of tensors, over the global batch of all ranks, in full precision under autocast."""

from lightning_contrast.losses.adversarial import rocl_loss
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
from lightning_contrast.losses.dense import dense_info_nce, vicregl_global_loss, vicregl_local_loss
from lightning_contrast.losses.distillation import (
    dino_loss,
    gram_loss,
    ibot_patch_loss,
    ijepa_loss,
    koleo_loss,
    masked_patch_loss,
)
from lightning_contrast.losses.fairness import fair_supcon_loss, hsic_loss
from lightning_contrast.losses.frozen_teacher import (
    compress_loss,
    crd_loss,
    crd_normalizers,
    disco_loss,
    hint_loss,
    kd_loss,
    noise_contrastive_loss,
    rkd_loss,
    seed_loss,
    simreg_loss,
)
from lightning_contrast.losses.gaussian import (
    draw_directions,
    epps_pulley,
    lejepa_loss,
    sigreg_loss,
    sliced_gaussian_loss,
    view_invariance,
    visreg_loss,
)
from lightning_contrast.losses.geometric import (
    alignment,
    margin_contrastive_loss,
    spectral_contrastive_loss,
    triplet_loss,
    uniformity,
)
from lightning_contrast.losses.group_dro import GroupDRO
from lightning_contrast.losses.image_text import clip_distillation_loss, clip_loss, siglip_loss
from lightning_contrast.losses.local_image_text import (
    attend_regions,
    gloria_global_loss,
    gloria_local_loss,
    region_attention,
)
from lightning_contrast.losses.masked_prediction import (
    average_layers,
    data2vec_loss,
    jepa_loss,
    masked_l1_loss,
    masked_pixel_loss,
    patchify,
    pixel_targets,
    unpatchify,
    vjepa_loss,
)
from lightning_contrast.losses.negatives import Negatives
from lightning_contrast.losses.predictive import byol_loss, moco_v3_loss, negative_cosine
from lightning_contrast.losses.predictive_coding import (
    cpc_all_times_loss,
    cpc_loss,
    cpc_sampled_loss,
    cpc_time_loss,
    draw_row_negatives,
    draw_time_negatives,
)
from lightning_contrast.losses.redundancy import (
    barlow_twins_loss,
    draw_permutations,
    mmcr_loss,
    tico_loss,
    vicreg_loss,
    w_mse_loss,
)
from lightning_contrast.losses.synthetic import mochi_negatives
from lightning_contrast.losses.temporal import tclr_global_local_loss, tclr_instance_loss, tclr_local_loss

__all__ = [
    "GroupDRO",
    "Negatives",
    "alignment",
    "attend_regions",
    "average_layers",
    "barlow_twins_loss",
    "bilinear_loss",
    "byol_loss",
    "clip_distillation_loss",
    "clip_loss",
    "compress_loss",
    "cpc_all_times_loss",
    "cpc_loss",
    "cpc_sampled_loss",
    "cpc_time_loss",
    "crd_loss",
    "crd_normalizers",
    "data2vec_loss",
    "debiased_nt_xent",
    "decoupled_nt_xent",
    "dense_info_nce",
    "dino_loss",
    "disco_loss",
    "draw_directions",
    "draw_permutations",
    "draw_row_negatives",
    "draw_time_negatives",
    "epps_pulley",
    "fair_supcon_loss",
    "gloria_global_loss",
    "gloria_local_loss",
    "gram_loss",
    "hard_negative_nt_xent",
    "hint_loss",
    "hsic_loss",
    "ibot_patch_loss",
    "ijepa_loss",
    "info_nce",
    "jepa_loss",
    "kd_loss",
    "koleo_loss",
    "lejepa_loss",
    "margin_contrastive_loss",
    "masked_l1_loss",
    "masked_patch_loss",
    "masked_pixel_loss",
    "mmcr_loss",
    "mochi_negatives",
    "moco_v3_loss",
    "msn_loss",
    "negative_cosine",
    "noise_contrastive_loss",
    "nt_xent",
    "patchify",
    "pixel_targets",
    "region_attention",
    "rkd_loss",
    "rocl_loss",
    "seed_loss",
    "siglip_loss",
    "sigreg_loss",
    "simreg_loss",
    "sinkhorn",
    "sliced_gaussian_loss",
    "spectral_contrastive_loss",
    "sup_con",
    "swav_loss",
    "tclr_global_local_loss",
    "tclr_instance_loss",
    "tclr_local_loss",
    "tico_loss",
    "triplet_loss",
    "uniformity",
    "unpatchify",
    "vicreg_loss",
    "vicregl_global_loss",
    "vicregl_local_loss",
    "view_invariance",
    "visreg_loss",
    "vjepa_loss",
    "w_mse_loss",
]
