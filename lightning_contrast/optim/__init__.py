"""Optimizers, parameter groups and schedules."""

from lightning_contrast.optim.build import OptimizerLike, build_optimizer, check_optimizer
from lightning_contrast.optim.clipping import clip_each_gradient, clip_gradients_together
from lightning_contrast.optim.groups import parameter_groups
from lightning_contrast.optim.lars import LARS
from lightning_contrast.optim.schedules import (
    check_warmup,
    constant,
    momentum_schedule,
    scaled_lr,
    step_decay,
    warmup_cosine,
    weight_decay_cosine,
)

__all__ = [
    "LARS",
    "OptimizerLike",
    "build_optimizer",
    "check_optimizer",
    "check_warmup",
    "clip_each_gradient",
    "clip_gradients_together",
    "constant",
    "momentum_schedule",
    "parameter_groups",
    "scaled_lr",
    "step_decay",
    "warmup_cosine",
    "weight_decay_cosine",
]
