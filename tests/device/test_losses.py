"""Every loss on the pretended device, forward and backward."""

import pytest
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast import losses
from tests.device.pretended import PretendedDevice, in_own_process

LABELS = torch.arange(8) % 3
# how each loss is called with two batches of rows (B, D) that require a gradient, and labels (B,)
CALLS = {
    "alignment": lambda a, b, y: losses.alignment(a, b),
    "barlow_twins_loss": lambda a, b, y: losses.barlow_twins_loss(a, b, off_diagonal_weight=0.005),
    "byol_loss": lambda a, b, y: losses.byol_loss(a, b.detach()),
    "clip_loss": lambda a, b, y: losses.clip_loss(a, b, temperature=0.1),
    "debiased_nt_xent": lambda a, b, y: losses.debiased_nt_xent(a, b, temperature=0.5, tau_plus=0.1),
    "decoupled_nt_xent": lambda a, b, y: losses.decoupled_nt_xent(a, b, temperature=0.1),
    "dino_loss": lambda a, b, y: losses.dino_loss([a, b, a + b], [a.detach(), b.detach()]),
}
