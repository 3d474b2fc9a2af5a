"""Parts with parameters or buffers: backbones, heads, BatchNorm in splits."""

from lightning_contrast.nn.backbones import Backbone, SmallConvNet, build_backbone, check_image_size, read_feature_dim
from lightning_contrast.nn.ema import ema_update
from lightning_contrast.nn.feature_queue import FeatureQueue
from lightning_contrast.nn.heads import (
    barlow_projector,
    byol_mlp,
    debiased_head,
    moco_head,
    moco_v3_predictor,
    moco_v3_projector,
    nnclr_predictor,
    nnclr_projector,
    simclr_head,
    simsiam_predictor,
    simsiam_projector,
    spectral_head,
    supcon_head,
    vicreg_expander,
)
from lightning_contrast.nn.memory_bank import MemoryBank
from lightning_contrast.nn.mlp import Norm, hidden_layers, mlp_head
from lightning_contrast.nn.split_batchnorm import SplitBatchNorm2d, convert_split_batchnorm
from lightning_contrast.nn.stems import use_small_stem

__all__ = [
    "Backbone",
    "FeatureQueue",
    "MemoryBank",
    "Norm",
    "SmallConvNet",
    "SplitBatchNorm2d",
    "barlow_projector",
    "build_backbone",
    "byol_mlp",
    "check_image_size",
    "convert_split_batchnorm",
    "debiased_head",
    "ema_update",
    "hidden_layers",
    "mlp_head",
    "moco_head",
    "moco_v3_predictor",
    "moco_v3_projector",
    "nnclr_predictor",
    "nnclr_projector",
    "read_feature_dim",
    "simclr_head",
    "simsiam_predictor",
    "simsiam_projector",
    "spectral_head",
    "supcon_head",
    "use_small_stem",
    "vicreg_expander",
]
