"""Alignment and uniformity: positive pairs are close, and features are uniform on the hypersphere.

Paper: https://arxiv.org/abs/2005.10242.
Reference implementation: SsnL/align_uniform (its STL-10 example).
Differs from it: the uniformity term uses the pairs of the global batch; no weight decay on norms and biases; the rate
drops at 77.5 %, 85 % and 92.5 % of any run instead of epochs 155, 170 and 185 of 200.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_not_negative, check_positive
from lightning_contrast.augment import align_uniform_views
from lightning_contrast.losses import alignment, uniformity
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import build_head
from lightning_contrast.optim import OptimizerLike, step_decay
from lightning_contrast.runtime.method_options import MethodOptions

_MILESTONES = (0.775, 0.85, 0.925)


class AlignUniform(SelfSupervisedModule):
    """Minimize the distance of positive pairs and the Gaussian potential of all pairs.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F). Logs ``train/alignment`` and
    ``train/uniformity`` in addition to the loss.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        projection_dim: D, the width of the projection, one linear layer.
        projector: A module (B, F) -> (B, D) that replaces that layer.
        align_weight: Weight of the alignment, >= 0.
        uniform_weight: Weight of the mean uniformity of the two views, >= 0.
        alpha: Power of the distance in the alignment, > 0.
        t: Sharpness of the potential in the uniformity, > 0.
        optimizer: "sgd" as in the reference implementation, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the reference's 0.12 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up; the reference has none.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.12
    views = staticmethod(align_uniform_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        align_weight: float = 1.0,
        uniform_weight: float = 1.0,
        alpha: float = 2.0,
        t: float = 2.0,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_not_negative("align_weight", align_weight)
        check_not_negative("uniform_weight", uniform_weight)
        check_positive("alpha", alpha, "The paper uses 2")
        check_positive("t", t, "The paper uses 2")
        self.align_weight, self.uniform_weight, self.alpha, self.t = align_weight, uniform_weight, alpha, t
        self.projector = projector or build_head("moco", self.feature_dim, out_dim=projection_dim, layers=1)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the weighted sum of alignment and uniformity, and features (B, F)."""
        view_a, view_b = self.batch_views(batch, count=2)
        features = self.backbone(torch.cat([view_a, view_b]))  # (2B, F): BatchNorm sees both views, as in the reference
        projection_a, projection_b = self.projector(features).chunk(2)  # (B, D) each
        align = alignment(projection_a, projection_b, alpha=self.alpha)
        uniform = (uniformity(projection_a, t=self.t) + uniformity(projection_b, t=self.t)) / 2
        loss = self.align_weight * align + self.uniform_weight * uniform
        for name, value in (("loss", loss), ("alignment", align), ("uniformity", uniform)):
            self.log(f"train/{name}", value, batch_size=len(view_a))
        return {"loss": loss, "features": features[: len(view_a)].detach()}

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up, then divided by 10 at each milestone."""
        if step < warmup_steps:
            return super().lr_factor(step, warmup_steps, total_steps)
        return step_decay(step, [round(share * total_steps) for share in _MILESTONES])
