"""Barlow Twins: the cross-correlation of two views' projections approaches the identity matrix.

Paper: https://arxiv.org/abs/2103.03230.
Reference implementation: facebookresearch/barlowtwins.
Differs from it: under DDP the reference's gradient is 1 / (number of ranks) of the global batch's, since its sum over
ranks is not differentiated; here it equals that of one process. The correlation is computed in float32 under autocast.
The loss standardizes dimensions itself, without a BatchNorm layer with unused running averages.
"""

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from lightning_contrast import optim
from lightning_contrast._checks import check_not_negative, check_positive
from lightning_contrast.augment import barlow_twins_views
from lightning_contrast.losses import barlow_twins_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, build_head
from lightning_contrast.nn.multi_crop import forward_each, mean_loss, view_pairs
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.layer_decay import RATE_MULTIPLIER, apply_rates
from lightning_contrast.runtime.method_options import MethodOptions


class BarlowTwins(SelfSupervisedModule):
    """Correlate each dimension of the projections with itself across views, and decorrelate it from all others.

    A batch holds two or more global views (B, C, h, w) of one size and any number of smaller local views after them;
    `forward` gives features (B, F). The loss is the mean over all pairs of views of which at least one is global.
    Statistics cover the images of all ranks.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the projector's hidden layers.
        projection_dim: D, the width of the projection.
        head_norm: Norm of the hidden layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) that replaces the head.
        off_diagonal_weight: Weight of the correlations between dimensions, >= 0.
        loss_scale: Factor of the loss, > 0, which matters for norms and biases only under LARS; solo-learn has 0.1 on
            CIFAR-10, where norms and biases have the learning rate of the weights.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.2 x global batch / 256.
        vector_lr: Learning rate of norms and biases as a share of ``lr``, > 0. Only for LARS, which adapts the
            rate of the weights but not theirs; the paper has 0.0048 and 0.2.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.001 of the peak; None is 10, fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.2
    views = staticmethod(barlow_twins_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        hidden_dim: int = 8192,
        projection_dim: int = 8192,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        off_diagonal_weight: float = 0.0051,
        loss_scale: float = 1.0,
        optimizer: OptimizerLike = "lars",
        lr: float | None = None,
        vector_lr: float = 0.024,
        weight_decay: float = 1e-6,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_not_negative("off_diagonal_weight", off_diagonal_weight)
        check_positive("loss_scale", loss_scale)
        check_positive("vector_lr", vector_lr)
        self.off_diagonal_weight, self.loss_scale, self.vector_lr = off_diagonal_weight, loss_scale, vector_lr
        self.projector = projector or build_head(
            "barlow_twins", self.feature_dim, hidden_dim=hidden_dim, out_dim=projection_dim, norm=head_norm
        )
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the scaled mean Barlow Twins loss of pairs of views, and features (B, F)."""
        views = self.batch_crops(batch)  # V x (B, C, h, w)
        features, projections = forward_each(views, self.backbone, self.projector)  # V x (B, F), V x (B, D)
        loss = self.loss_scale * mean_loss(
            barlow_twins_loss(projections[i], projections[j], off_diagonal_weight=self.off_diagonal_weight)
            for i, j in view_pairs(views, both_ways=False)
        )
        self.log("train/loss", loss, batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule; with LARS, norms and biases have their own learning rate."""
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"]
        if isinstance(optimizer, optim.LARS):  # also one given as a class
            for group in optimizer.param_groups:
                if not group["adapt"] and "bounds" not in group:
                    group[RATE_MULTIPLIER] = self.vector_lr
            apply_rates(configured)
        return configured

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up from 0, then a cosine to 0.001."""
        return optim.warmup_cosine(step, warmup_steps, total_steps, end=0.001)
