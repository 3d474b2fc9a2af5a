"""View policies: modules that turn a batch of images into random views, on the device of the batch.

A policy maps a batch of images to a list of views; ``policy.eval_transform(images)`` is the deterministic transform of
evaluation. Kornia is imported when the first policy is made. The fused operations that policies are made of are in
`lightning_contrast.augment.fused`.
"""

from lightning_contrast.augment.multi_crop import dino_views, dinov2_views, ijepa_views, msn_views, swav_views
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.two_view import (
    barlow_twins_views,
    byol_views,
    moco_v1_views,
    moco_v2_views,
    moco_v3_views,
    simclr_cifar_views,
    simclr_views,
    simsiam_views,
    supcon_views,
    vicreg_views,
)
from lightning_contrast.augment.view_spec import ViewRecipe

__all__ = [
    "ViewPolicy",
    "ViewRecipe",
    "barlow_twins_views",
    "byol_views",
    "dino_views",
    "dinov2_views",
    "ijepa_views",
    "make_policy",
    "moco_v1_views",
    "moco_v2_views",
    "moco_v3_views",
    "msn_views",
    "simclr_cifar_views",
    "simclr_views",
    "simsiam_views",
    "supcon_views",
    "swav_views",
    "vicreg_views",
]
