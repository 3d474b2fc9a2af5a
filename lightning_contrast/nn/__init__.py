"""Modules with parameters or buffers: backbones, heads, queues, EMA, masking."""

from lightning_contrast.losses import GroupDRO, sinkhorn
from lightning_contrast.nn.activation_checkpointing import checkpoint_activations
from lightning_contrast.nn.backbones import (
    Backbone,
    BackboneOptions,
    SmallConvNet,
    build_backbone,
    check_image_size,
    read_feature_dim,
)
from lightning_contrast.nn.byte_tokenizer import ByteTokenizer
from lightning_contrast.nn.center import Center, SecondMoment
from lightning_contrast.nn.distillation_heads import DistillationHead, PatchDistillationHead
from lightning_contrast.nn.distillation_objectives import OBJECTIVES, Objective, ObjectiveSettings
from lightning_contrast.nn.ema import ema_update
from lightning_contrast.nn.feature_queue import FeatureQueue
from lightning_contrast.nn.frozen_teacher import FeatureCache, FrozenTeacher
from lightning_contrast.nn.heads import HEADS, Head, HeadOptions, PatchPrototypeHead, PrototypeHead, build_head
from lightning_contrast.nn.jepa_masking import JepaMasks, JepaMaskSampler
from lightning_contrast.nn.jepa_predictor import JepaPredictor
from lightning_contrast.nn.logit_scale import LogitBias, LogitScale
from lightning_contrast.nn.lora import LoRALinear, add_lora, merge_lora
from lightning_contrast.nn.masking import (
    MaskedPatches,
    MaskSplit,
    check_mask_ratios,
    dinov2_masks,
    ibot_masks,
    masked_patches,
    split_masks,
)
from lightning_contrast.nn.memory_bank import MemoryBank
from lightning_contrast.nn.mlp import Norm, hidden_layers, mlp_head
from lightning_contrast.nn.ngrams import NGramTokenizer, NGramTower
from lightning_contrast.nn.open_clip_towers import OpenClipTokenizer
from lightning_contrast.nn.patch_grid import GridContext, GridPredictors, PatchGrid, replace_batchnorm
from lightning_contrast.nn.patch_masks import (
    MASKS,
    MaskSampler,
    block_masks,
    build_masks,
    grid_masks,
    inverse_block_masks,
    random_masks,
    tubelet_masks,
)
from lightning_contrast.nn.pixel_decoder import PixelDecoder
from lightning_contrast.nn.positions import sincos_positions, sincos_positions_2d, sincos_positions_3d
from lightning_contrast.nn.prototypes import Prototypes
from lightning_contrast.nn.region_maps import RegionMaps
from lightning_contrast.nn.rope import Rope, rope_positions, use_rope
from lightning_contrast.nn.small_vit import small_vit
from lightning_contrast.nn.split_batchnorm import SplitBatchNorm2d, convert_split_batchnorm
from lightning_contrast.nn.stems import use_small_stem
from lightning_contrast.nn.temperature import LearnedTemperature, ScheduledTemperature
from lightning_contrast.nn.text_transformer import TextTransformer
from lightning_contrast.nn.time_predictor import TimePredictor
from lightning_contrast.nn.tubelets import VIDEO_VITS, TubeletPredictor, TubeletViT, build_tubelet_backbone
from lightning_contrast.nn.video import (
    SmallVideoConvNet,
    VideoBackbone,
    build_clip_backbone,
    clip_steps,
    project_moments,
    time_mean,
)
from lightning_contrast.nn.vision_transformers import MaskedViT, Tokens, build_masked_backbone, select_patches
from lightning_contrast.nn.weight_norm import WeightNormLinear

__all__ = [
    "HEADS",
    "MASKS",
    "OBJECTIVES",
    "VIDEO_VITS",
    "Backbone",
    "BackboneOptions",
    "ByteTokenizer",
    "Center",
    "DistillationHead",
    "FeatureCache",
    "FeatureQueue",
    "FrozenTeacher",
    "GridContext",
    "GridPredictors",
    "GroupDRO",
    "Head",
    "HeadOptions",
    "JepaMaskSampler",
    "JepaMasks",
    "JepaPredictor",
    "LearnedTemperature",
    "LoRALinear",
    "LogitBias",
    "LogitScale",
    "MaskSampler",
    "MaskSplit",
    "MaskedPatches",
    "MaskedViT",
    "MemoryBank",
    "NGramTokenizer",
    "NGramTower",
    "Norm",
    "Objective",
    "ObjectiveSettings",
    "OpenClipTokenizer",
    "PatchDistillationHead",
    "PatchGrid",
    "PatchPrototypeHead",
    "PixelDecoder",
    "PrototypeHead",
    "Prototypes",
    "RegionMaps",
    "Rope",
    "ScheduledTemperature",
    "SecondMoment",
    "SmallConvNet",
    "SmallVideoConvNet",
    "SplitBatchNorm2d",
    "TextTransformer",
    "TimePredictor",
    "Tokens",
    "TubeletPredictor",
    "TubeletViT",
    "VideoBackbone",
    "WeightNormLinear",
    "add_lora",
    "block_masks",
    "build_backbone",
    "build_clip_backbone",
    "build_head",
    "build_masked_backbone",
    "build_masks",
    "build_tubelet_backbone",
    "check_image_size",
    "check_mask_ratios",
    "checkpoint_activations",
    "clip_steps",
    "convert_split_batchnorm",
    "dinov2_masks",
    "ema_update",
    "grid_masks",
    "hidden_layers",
    "ibot_masks",
    "inverse_block_masks",
    "masked_patches",
    "merge_lora",
    "mlp_head",
    "project_moments",
    "random_masks",
    "read_feature_dim",
    "replace_batchnorm",
    "rope_positions",
    "select_patches",
    "sincos_positions",
    "sincos_positions_2d",
    "sincos_positions_3d",
    "sinkhorn",
    "small_vit",
    "split_masks",
    "time_mean",
    "tubelet_masks",
    "use_rope",
    "use_small_stem",
]
