"""Spectral contrastive learning: maximize inner products of views, minimize squared ones of other images.

Paper: https://arxiv.org/abs/2106.04156.
Reference implementation: jhaochenz/spectral_contrastive_learning.
Differs from it: the loss is that of the global batch instead of one replica; no weight decay on norms and biases. The
defaults are the CIFAR-10 recipe; ImageNet has ``head_layers=3, hidden_dim=8192, projection_dim=8192, mu=10``,
``weight_decay=1e-4`` and a base learning rate of 0.05.
"""

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from lightning_contrast._checks import check_positive
from lightning_contrast.augment import moco_v2_views
from lightning_contrast.losses import spectral_contrastive_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, build_head
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions


class SpectralContrastive(SelfSupervisedModule):
    """Minimize the spectral contrastive loss, a factorization of the augmentation graph.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        head_layers: Layers of the projector.
        hidden_dim: Width of its hidden layers.
        projection_dim: D, the width of the projection.
        head_norm: Norm of the projector's layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) that replaces the head.
        mu: Maximum squared norm of a projection, > 0; longer ones are rescaled to it.
        optimizer: "sgd" as in the reference implementation, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the reference's 0.03 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; None is 10, fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.03
    views = staticmethod(moco_v2_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        head_layers: int = 2,
        hidden_dim: int = 2048,
        projection_dim: int = 1000,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        mu: float = 1.0,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 5e-4,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_positive("mu", mu, "The paper uses 1 for CIFAR and 10 for ImageNet")
        self.mu = mu
        self.projector = projector or build_head(
            "spectral",
            self.feature_dim,
            hidden_dim=hidden_dim,
            out_dim=projection_dim,
            layers=head_layers,
            norm=head_norm,
        )
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the spectral contrastive loss of two views, and features (B, F)."""
        view_a, view_b = self.batch_views(batch, count=2)
        features = self.backbone(view_a)  # (B, F)
        projection_a = self.projector(features)  # (B, D)
        projection_b = self.projector(self.backbone(view_b))  # (B, D)
        loss = spectral_contrastive_loss(projection_a, projection_b, mu=self.mu)
        self.log("train/loss", loss, batch_size=len(view_a))
        return {"loss": loss, "features": features.detach()}
