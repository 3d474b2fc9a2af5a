"""BYOL: an online network predicts the target network's projection of the other view; no negatives.

Paper: https://arxiv.org/abs/2006.07733.
Reference program: google-deepmind/deepmind-research (byol).
Differs from it: the target network starts as a copy and not from a seed of its own; the program's linear classifier on
the side is `OnlineLinearProbe`.
"""

import copy
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_probability
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.losses import byol_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, byol_mlp
from lightning_contrast.optim import OptimizerLike


class BYOL(SelfSupervisedModule):
    """Predict each view's target projection from the other view.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        hidden_dim: Width of the hidden layers of projector and predictor.
        projection_dim: D, the width of projection and prediction, also of a ``projector`` of your own.
        head_norm: Norm of the hidden layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) in the place of the head; the target network gets a copy.
        predictor: A module (B, D) -> (B, D) in the place of the predictor.
        momentum: Share of the target network that the first step keeps, in [0, 1]; it rises to 1 as a cosine. The
            paper has 0.996 for 1,000 epochs, 0.99 for 100 and 300.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Learning rate after the warm-up, absolute; None is the paper's 0.2 x global batch / 256, for 1,000 epochs.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
    """

    base_lr: ClassVar[float] = 0.2

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
        momentum: float = 0.996,
        optimizer: OptimizerLike = "lars",
        lr: float | None = None,
        weight_decay: float = 1.5e-6,
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
        check_probability("momentum", momentum)
        self.momentum = momentum
        self.projector = projector or byol_mlp(self.feature_dim, hidden_dim, projection_dim, norm=head_norm)
        self.predictor = predictor or byol_mlp(projection_dim, hidden_dim, projection_dim, norm=head_norm)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the sum of both directions' squared distances, in [0, 8]."""
        view_a, view_b = self.views(batch, count=2)
        features = self.backbone(view_a)  # (B, F)
        prediction_a = self.predictor(self.projector(features))  # (B, D)
        prediction_b = self.predictor(self.projector(self.backbone(view_b)))  # (B, D)
        with torch.no_grad():
            target_a = self.momentum_projector(self.momentum_backbone(view_a))  # (B, D)
            target_b = self.momentum_projector(self.momentum_backbone(view_b))  # (B, D)
        loss = byol_loss(prediction_a, target_b) + byol_loss(prediction_b, target_a)
        self.log("train/loss", loss, batch_size=len(view_a))
        return {"loss": loss, "features": features.detach()}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the online network's parts with those of the target network; the predictor has none."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def default_callbacks(self) -> list[L.Callback]:
        """Return what moves the target network."""
        return [MomentumUpdate(self.momentum)]
