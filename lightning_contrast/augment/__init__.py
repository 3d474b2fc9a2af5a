"""View policies: modules that map a batch of images to a list of random views, on the device of the images.

Every policy takes ``size`` first and all else by keyword, starting with ``mean`` and ``std``.
``policy.eval_transform(images)`` is the deterministic transform of evaluation. Kornia is imported when the first policy
is made. `lightning_contrast.augment.fused` has the operations of which policies are made, and
`lightning_contrast.augment.domains` the policies for other images than photographs.
"""

from lightning_contrast.augment.adversarial import pgd_attack, pgd_step
from lightning_contrast.augment.bands import append_indices
from lightning_contrast.augment.clips import ClipPolicy, clip_distance, clip_views, cpc_clip_views, vjepa_views
from lightning_contrast.augment.corruptions import CORRUPTIONS, HELD_OUT_CORRUPTIONS, corrupt
from lightning_contrast.augment.curriculum import StrengthSchedule
from lightning_contrast.augment.frequency import high_frequency
from lightning_contrast.augment.located_view import LocatedView, cell_locations
from lightning_contrast.augment.multi_crop import (
    dino_views,
    dinov2_views,
    lejepa_views,
    msn_views,
    swav_views,
    visreg_views,
)
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.single_view import (
    cpc_views,
    data2vec_views,
    gloria_views,
    ijepa_views,
    image_text_views,
    mae_views,
    simmim_views,
)
from lightning_contrast.augment.stains import hed_to_rgb, rgb_to_hed, stain_jitter
from lightning_contrast.augment.two_view import (
    align_uniform_views,
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
    vicregl_views,
    wmse_views,
)
from lightning_contrast.augment.view_spec import ViewSpec
from lightning_contrast.augment.whole_images import WholeImages

__all__ = [
    "CORRUPTIONS",
    "HELD_OUT_CORRUPTIONS",
    "ClipPolicy",
    "LocatedView",
    "StrengthSchedule",
    "ViewPolicy",
    "ViewSpec",
    "WholeImages",
    "align_uniform_views",
    "append_indices",
    "barlow_twins_views",
    "byol_views",
    "cell_locations",
    "clip_distance",
    "clip_views",
    "corrupt",
    "cpc_clip_views",
    "cpc_views",
    "data2vec_views",
    "dino_views",
    "dinov2_views",
    "gloria_views",
    "hed_to_rgb",
    "high_frequency",
    "ijepa_views",
    "image_text_views",
    "lejepa_views",
    "mae_views",
    "make_policy",
    "moco_v1_views",
    "moco_v2_views",
    "moco_v3_views",
    "msn_views",
    "pgd_attack",
    "pgd_step",
    "rgb_to_hed",
    "simclr_cifar_views",
    "simclr_views",
    "simmim_views",
    "simsiam_views",
    "stain_jitter",
    "supcon_views",
    "swav_views",
    "vicreg_views",
    "vicregl_views",
    "visreg_views",
    "vjepa_views",
    "wmse_views",
]
