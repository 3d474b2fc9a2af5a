"""One line a method: how the contract suite makes it small, and what it does not need to be asked."""

from collections.abc import Callable
from dataclasses import dataclass, field

import lightning as L
import torch
from torch import nn

import lightning_contrast as lc


class TinyBackbone(nn.Module):
    """Two convolutions without BatchNorm, so that two ranks can equal one process."""

    num_features = 8

    def __init__(self, norm: bool = False):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            nn.GELU(),
            nn.Conv2d(6, 8, 3, 2, 1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, images):
        return self.layers(images)


@dataclass(frozen=True)
class Case:
    """A method in small.

    Args:
        make: Called with a backbone and keyword arguments (optimizer, lr, warmup_epochs).
        plain: Further arguments that take BatchNorm out of the heads.
        views: Number of views in a batch.
    """

    make: Callable[..., L.LightningModule]
    plain: dict = field(default_factory=dict)
    views: int = 2


CASES = {
    "SimCLR": Case(lc.SimCLR, plain={"head_norm": None}),
    "SimCLR v2": Case(lambda *a, **k: lc.SimCLR(*a, head_layers=3, evaluation_layer=1, **k), plain={"head_norm": None}),
}


def make(name: str, *, norm: bool = True, **kwargs) -> L.LightningModule:
    """Build a case with seeded weights; ``norm=False`` leaves BatchNorm out everywhere."""
    torch.manual_seed(0)
    case = CASES[name]
    settings = {"optimizer": "sgd", "lr": 0.05, "warmup_epochs": 0} | ({} if norm else case.plain) | kwargs
    return case.make(TinyBackbone(norm), **settings)
