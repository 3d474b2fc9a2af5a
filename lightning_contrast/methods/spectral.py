"""Spectral contrastive learning: inner products of views grow, squared inner products of other images shrink.

Paper: https://arxiv.org/abs/2106.04156.
Reference program: jhaochenz/spectral_contrastive_learning.
Differs from it: the loss is that of the global batch, not of one replica; norms and biases carry no weight decay. The
defaults are the CIFAR-10 recipe; ImageNet has ``head_layers=3, hidden_dim=8192, projection_dim=8192, mu=10``,
``weight_decay=1e-4`` and a base rate of 0.05.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_contrast._checks import check_positive
from lightning_contrast.losses import spectral_contrastive_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, spectral_head
from lightning_contrast.optim import OptimizerLike


class SpectralContrastive(SelfSupervisedModule):
    """Factorise the graph of augmentations: the spectral contrastive loss.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        head_layers: Layers of the projector.
        hidden_dim: Width of its hidden layers.
        projection_dim: D, the width of the projection.
        head_norm: Norm of the projector's layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) in the place of the head.
        mu: Square of the largest length of a projection, > 0; longer ones are shortened to it.
        optimizer: "sgd" as in the program, "adamw", "lars", "lamb", or a callable.
        lr: Learning rate after the warm-up, absolute; None is the program's 0.03 x global batch / 256.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
    """

    base_lr: ClassVar[float] = 0.03

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        head_layers: int = 2,
        hidden_dim: int = 2048,
        projection_dim: int = 1000,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        mu: float = 1.0,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 5e-4,
        warmup_epochs: int = 10,
    ) -> None:
        super().__init__(
            backbone,
            small_images=small_images,
            feature_dim=feature_dim,
            backbone_kwargs=backbone_kwargs,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
        )
        check_positive("mu", mu, "The paper uses 1 for CIFAR and 10 for ImageNet")
        self.mu = mu
        self.projector = projector or spectral_head(
            self.feature_dim, hidden_dim, projection_dim, layers=head_layers, norm=head_norm
        )
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the spectral contrastive loss of a batch of two views."""
        view_a, view_b = self.views(batch, count=2)
        features = self.backbone(view_a)  # (B, F)
        projection_a = self.projector(features)  # (B, D)
        projection_b = self.projector(self.backbone(view_b))  # (B, D)
        loss = spectral_contrastive_loss(projection_a, projection_b, mu=self.mu)
        self.log("train/loss", loss, batch_size=len(view_a))
        return {"loss": loss, "features": features.detach()}
