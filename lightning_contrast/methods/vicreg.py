"""VICReg: two views' embeddings agree, each dimension keeps its variance, and no two dimensions covary.

Paper: https://arxiv.org/abs/2105.04906.
Reference program: facebookresearch/vicreg.
Differs from it: the covariance is computed in float32 under autocast.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_contrast import optim
from lightning_contrast._checks import check_not_negative
from lightning_contrast.losses import vicreg_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, vicreg_expander
from lightning_contrast.optim import OptimizerLike


class VICReg(SelfSupervisedModule):
    """Regularise invariance, variance and covariance of the expanded features of two views.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F). Variance and covariance are those of all
    ranks' images.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        hidden_dim: Width of the expander's hidden layers.
        projection_dim: D, the width of the embedding.
        head_norm: Norm of the hidden layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) in the place of the expander.
        invariance_weight: Weight of the mean squared difference of the views, >= 0.
        variance_weight: Weight of the hinge that keeps each dimension's deviation at 1, >= 0.
        covariance_weight: Weight of the squared covariances between dimensions, >= 0.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Learning rate after the warm-up, absolute; None is the paper's 0.2 x global batch / 256, for 1,000 epochs.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to a thousandth.
    """

    base_lr: ClassVar[float] = 0.2

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        hidden_dim: int = 8192,
        projection_dim: int = 8192,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        optimizer: OptimizerLike = "lars",
        lr: float | None = None,
        weight_decay: float = 1e-6,
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
        check_not_negative("invariance_weight", invariance_weight)
        check_not_negative("variance_weight", variance_weight)
        check_not_negative("covariance_weight", covariance_weight)
        self.invariance_weight, self.variance_weight = invariance_weight, variance_weight
        self.covariance_weight = covariance_weight
        self.projector = projector or vicreg_expander(self.feature_dim, hidden_dim, projection_dim, norm=head_norm)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the weighted sum of the three terms of a batch of two views."""
        view_a, view_b = self.views(batch, count=2)
        features = self.backbone(view_a)  # (B, F)
        loss = vicreg_loss(
            self.projector(features),  # (B, D)
            self.projector(self.backbone(view_b)),  # (B, D)
            invariance_weight=self.invariance_weight,
            variance_weight=self.variance_weight,
            covariance_weight=self.covariance_weight,
        )
        self.log("train/loss", loss, batch_size=len(view_a))
        return {"loss": loss, "features": features.detach()}

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the warm-up from 0 and the program's cosine to 0.001."""
        return optim.warmup_cosine(step, warmup_steps, total_steps, end=0.001)
