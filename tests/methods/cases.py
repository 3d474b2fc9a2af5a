"""One line a method: how the contract suite makes it small, and what it does not need to be asked."""

from collections.abc import Callable
from dataclasses import dataclass, field

import lightning as L
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.contracts import HasQueues
from lightning_contrast.nn import FeatureQueue


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
        settings: Arguments that make the method small.
        indices: The method needs sample indices in the batch.
    """

    make: Callable[..., L.LightningModule]
    plain: dict = field(default_factory=dict)
    views: int = 2
    settings: dict = field(default_factory=dict)
    indices: bool = False

    @property
    def stateful(self) -> bool:
        """Whether the class has a momentum network or a queue."""
        return hasattr(self.make, "momentum_pairs") or hasattr(self.make, "queues")


CASES = {
    "SimCLR": Case(lc.SimCLR, plain={"head_norm": None}),
    "SimCLR v2": Case(lambda *a, **k: lc.SimCLR(*a, head_layers=3, evaluation_layer=1, **k), plain={"head_norm": None}),
}

HEADS = {"hidden_dim": 16, "projection_dim": 8}
QUEUE = {"queue_size": 24, "projection_dim": 8}
MIXES = {"hardest": 8, "pair_mixes": 6, "query_mixes": 4, "start_epoch": 1}
CASES |= {
    "MoCo": Case(lc.MoCo, settings=QUEUE),
    "MoCo symmetric": Case(lc.MoCo, settings=QUEUE | {"symmetric": True, "head_layers": 1, "negatives": "heated"}),
    "MoCo split": Case(lc.MoCo, settings=QUEUE | {"batchnorm_splits": 2}),
    "MoCoV3": Case(lc.MoCoV3, plain={"head_norm": None}, settings=HEADS),
    "BYOL": Case(lc.BYOL, plain={"head_norm": None}, settings=HEADS),
    "SimSiam": Case(lc.SimSiam, plain={"head_norm": None}, settings={"projection_dim": 8, "predictor_dim": 4}),
    "NPID": Case(lc.NPID, views=1, indices=True, settings={"num_samples": 32, "projection_dim": 8, "noise": 0}),
    "NPID noise": Case(
        lc.NPID,
        plain={"noise": 0},
        views=1,
        indices=True,
        settings={"num_samples": 32, "projection_dim": 8, "noise": 5},
    ),
    "NNCLR": Case(lc.NNCLR, plain={"head_norm": None}, settings=HEADS | {"queue_size": 24, "predictor_dim": 12}),
    "SupCon": Case(lc.SupCon, settings={"projection_dim": 8}),
    "SpectralContrastive": Case(lc.SpectralContrastive, plain={"head_norm": None}, settings=HEADS),
    "AlignUniform": Case(lc.AlignUniform, settings={"projection_dim": 8}),
    "SiameseMargin": Case(lc.SiameseMargin, plain={"miner": "hardest"}, settings={"projection_dim": 8}),
    "Triplet": Case(lc.Triplet, settings={"projection_dim": 8}),
    "Triplet labels": Case(lc.Triplet, settings={"projection_dim": 8, "use_labels": True, "miner": "hardest"}),
    "MoCHi": Case(lc.MoCHi, plain={"start_epoch": 9}, settings=QUEUE | MIXES),
}


def make(name: str, *, norm: bool = True, **kwargs) -> L.LightningModule:
    """Build a case with seeded weights; ``norm=False`` leaves BatchNorm out everywhere."""
    torch.manual_seed(0)
    case = CASES[name]
    settings = (
        {"optimizer": "sgd", "lr": 0.05, "warmup_epochs": 0} | case.settings | ({} if norm else case.plain) | kwargs
    )
    return case.make(TinyBackbone(norm), **settings)


def fill_queue(module: L.LightningModule) -> L.LightningModule:
    """Put seeded rows into every queue, as steps before would have: without negatives the loss is constant."""
    queues = module.queues() if isinstance(module, HasQueues) else {}
    for queue in queues.values():
        if isinstance(queue, FeatureQueue):
            queue.push(torch.randn(queue.size - 4, queue.dim, generator=torch.Generator().manual_seed(1)))
    return module
