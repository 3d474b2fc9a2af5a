"""BYOL: the online network predicts the EMA target network's projection of the other view, without negatives.

Paper: https://arxiv.org/abs/2006.07733.
Reference implementation: google-deepmind/deepmind-research (byol).
Differs from it: the target network starts as a copy instead of from its own seed; the reference's online linear
classifier is `OnlineLinearProbe`.
"""

import copy
from typing import Any, ClassVar, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_probability
from lightning_contrast.augment import byol_views
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.losses import byol_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, build_head
from lightning_contrast.nn.multi_crop import count_global_views, forward_each, mean_loss, view_pairs
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions


class BYOL(SelfSupervisedModule):
    """Predict each view's target projection from the other view.

    A batch holds two or more global views (B, C, h, w) of one size and any number of smaller local views after them;
    `forward` gives features (B, F). Predictions of all views, global and local, are compared with the targets of
    the other global views; the target network sees no local views. The loss is twice the mean over these pairs.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the hidden layers of projector and predictor.
        projection_dim: D, the width of projection and prediction, also of a custom ``projector``.
        head_norm: Norm of the hidden layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) that replaces the head; the target network gets a copy.
        predictor: A module (B, D) -> (B, D) that replaces the predictor.
        momentum: EMA momentum of the target network at the first step, in [0, 1]; rises to 1 as a cosine. The paper
            has 0.996 for 1,000 epochs, 0.99 for 100 and 300.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.2 x global batch / 256, for 1,000 epochs.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; None is 10, fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.2
    views = staticmethod(byol_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
        momentum: float = 0.996,
        optimizer: OptimizerLike = "lars",
        lr: float | None = None,
        weight_decay: float = 1.5e-6,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_probability("momentum", momentum)
        self.momentum = momentum
        head: dict[str, Any] = {"hidden_dim": hidden_dim, "out_dim": projection_dim, "norm": head_norm}
        self.projector = projector or build_head("byol", self.feature_dim, **head)
        self.predictor = predictor or build_head("byol", projection_dim, **head)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return twice the mean squared distance of prediction and target, in [0, 8], and features (B, F)."""
        views = self.batch_crops(batch)  # V x (B, C, h, w)
        features, _, predictions = forward_each(views, self.backbone, self.projector, self.predictor)  # V x (B, F or D)
        with torch.no_grad():
            global_views = views[: count_global_views(views)]
            _, targets = forward_each(global_views, self.momentum_backbone, self.momentum_projector)  # G x (B, D)
        pairs = view_pairs(views, both_ways=True)
        loss = 2 * mean_loss(byol_loss(predictions[i], targets[j]) for i, j in pairs)  # both directions of two views
        self.log("train/loss", loss, batch_size=len(views[0]))
        # MomentumUpdate moves the target network after the optimizer step.
        return {"loss": loss, "features": features[0].detach()}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online, target) modules; the predictor has no target."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback."""
        return [MomentumUpdate(self.momentum)]
