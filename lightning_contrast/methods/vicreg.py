"""VICReg: invariance between views, a minimum variance per dimension, and zero covariance between dimensions.

Paper: https://arxiv.org/abs/2105.04906.
Reference implementation: facebookresearch/vicreg.
Differs from it: the covariance is computed in float32 under autocast.
"""

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from lightning_contrast import optim
from lightning_contrast._checks import check_not_negative, check_positive
from lightning_contrast.augment import vicreg_views
from lightning_contrast.losses import vicreg_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, build_head
from lightning_contrast.nn.multi_crop import forward_each, mean_loss, view_pairs
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions


class VICReg(SelfSupervisedModule):
    """Regularize invariance, variance and covariance of the embeddings of two views.

    A batch holds two or more global views (B, C, h, w) of one size and any number of smaller local views after them;
    `forward` gives features (B, F). The loss is the mean over all pairs of views of which at least one is global.
    Variance and covariance cover the images of all ranks.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the expander's hidden layers.
        projection_dim: D, the width of the embedding.
        head_norm: Norm of the hidden layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) that replaces the expander.
        invariance_weight: Weight of the mean squared difference of the views, >= 0.
        variance_weight: Weight of the hinge that keeps each dimension's standard deviation at 1, >= 0.
        covariance_weight: Weight of the squared covariances between dimensions, >= 0.
        epsilon: Added to the variances under the square root, > 0; 1e-4 in the paper.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.2 x global batch / 256, for 1,000 epochs.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.001 of the peak; None is 10, fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.2
    views = staticmethod(vicreg_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        hidden_dim: int = 8192,
        projection_dim: int = 8192,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        epsilon: float = 1e-4,
        optimizer: OptimizerLike = "lars",
        lr: float | None = None,
        weight_decay: float = 1e-6,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_not_negative("invariance_weight", invariance_weight)
        check_not_negative("variance_weight", variance_weight)
        check_not_negative("covariance_weight", covariance_weight)
        check_positive("epsilon", epsilon, "The paper uses 1e-4")
        self.invariance_weight, self.variance_weight = invariance_weight, variance_weight
        self.covariance_weight, self.epsilon = covariance_weight, epsilon
        self.projector = projector or build_head(
            "vicreg", self.feature_dim, hidden_dim=hidden_dim, out_dim=projection_dim, norm=head_norm
        )
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the weighted sum of the three terms, a mean over pairs of views, and features (B, F)."""
        views = self.batch_crops(batch)  # V x (B, C, h, w)
        features, projections = forward_each(views, self.backbone, self.projector)  # V x (B, F), V x (B, D)
        weights = {
            "invariance_weight": self.invariance_weight,
            "variance_weight": self.variance_weight,
            "covariance_weight": self.covariance_weight,
            "epsilon": self.epsilon,
        }
        loss = mean_loss(
            vicreg_loss(projections[i], projections[j], **weights) for i, j in view_pairs(views, both_ways=False)
        )
        self.log("train/loss", loss, batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up from 0, then a cosine to 0.001."""
        return optim.warmup_cosine(step, warmup_steps, total_steps, end=0.001)
