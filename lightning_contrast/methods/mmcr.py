"""MMCR: the centroids of the images, means over their views, have a large nuclear norm.

Paper: https://arxiv.org/abs/2303.03307.
Reference implementation: ThomasYerxa/mmcr.
Differs from it: with several ranks the gradient is that of one process, in the reference 1 / (number of ranks) of it;
the nuclear norms are computed in float32 under autocast.
"""

import copy
from typing import ClassVar, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_not_negative, check_probability
from lightning_contrast.augment import barlow_twins_views
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.losses import mmcr_loss
from lightning_contrast.methods.joint_embedding import JointEmbeddingModule, JointEmbeddingOptions
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.optim import OptimizerLike


class MMCR(JointEmbeddingModule):
    """Maximize the nuclear norm of the centroids of the images of all ranks.

    Views as in `JointEmbeddingModule`; each image's centroid is the mean of the unit embeddings of all its views, local
    ones included. More views help: the paper has 2 to 8 on ImageNet and 40 on CIFAR-10, where 32 images are a batch.
    Loss and gradient grow with the global batch.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the projector's hidden layers.
        projection_dim: D, the width of the embedding.
        local_weight: Weight of the mean nuclear norm of the views of each image, >= 0.
        momentum: None, or the constant EMA momentum in [0, 1] of a second network, which embeds all views too; each
            centroid is then the mean of those of both networks. The reference implementation has 0.99 as an option.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        weight_decay: Weight decay of all parameters except norms and biases.
        **options: See `JointEmbeddingOptions`. ``lr=None`` is the paper's 0.6 x global batch / 256.
    """

    base_lr: ClassVar[float] = 0.6
    views = staticmethod(barlow_twins_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        hidden_dim: int = 8192,
        projection_dim: int = 512,
        local_weight: float = 0.0,
        momentum: float | None = None,
        optimizer: OptimizerLike = "lars",
        weight_decay: float = 1e-6,
        **options: Unpack[JointEmbeddingOptions],
    ) -> None:
        super().__init__(
            backbone,
            head="mmcr",
            hidden_dim=hidden_dim,
            projection_dim=projection_dim,
            optimizer=optimizer,
            weight_decay=weight_decay,
            **options,
        )
        check_not_negative("local_weight", local_weight)
        self.local_weight, self.momentum = local_weight, momentum
        self.momentum_backbone: nn.Module | None = None
        self.momentum_projector: nn.Module | None = None
        if momentum is not None:
            check_probability("momentum", momentum)
            self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
            self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.save_hyperparameters()

    def view_loss(self, projections: Tensor, views: list[Tensor], generator: torch.Generator) -> Tensor:
        """Return the MMCR loss of projections (V, B, D)."""
        targets = None
        if self.momentum_backbone is not None and self.momentum_projector is not None:
            with torch.no_grad():
                features = torch.cat(forward_by_size(self.momentum_backbone, views))  # (V B, F)
                targets = self.momentum_projector(features).unflatten(0, (len(views), -1)).transpose(0, 1)  # (B, V, D)
        return mmcr_loss(projections.transpose(0, 1), targets, local_weight=self.local_weight)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online, momentum) modules; none without ``momentum``."""
        if self.momentum_backbone is None or self.momentum_projector is None:
            return []
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback if there is a momentum network."""
        return [] if self.momentum is None else [MomentumUpdate(self.momentum, schedule="constant")]
