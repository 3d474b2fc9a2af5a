"""Alignment and uniformity: views of one image come together, all images spread over the sphere.

Paper: https://arxiv.org/abs/2005.10242.
Reference program: SsnL/align_uniform (its STL-10 example).
Differs from it: the pairs of the uniformity term are those of the global batch; norms and biases carry no weight decay;
the rate falls at 77.5 %, 85 % and 92.5 % of any run, not at epochs 155, 170 and 185 of 200.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_not_negative, check_positive
from lightning_contrast.losses import alignment, uniformity
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import moco_head
from lightning_contrast.optim import OptimizerLike, step_decay

_MILESTONES = (0.775, 0.85, 0.925)


class AlignUniform(SelfSupervisedModule):
    """Minimise the distance of positive pairs and the potential of all pairs.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F). Logs ``train/alignment`` and
    ``train/uniformity`` beside the loss.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        projection_dim: D, the width of the projection, one linear layer.
        projector: A module (B, F) -> (B, D) in the place of that layer.
        align_weight: Weight of the alignment, >= 0.
        uniform_weight: Weight of the mean uniformity of the two views, >= 0.
        alpha: Power of the distance in the alignment, > 0.
        t: Sharpness of the potential in the uniformity, > 0.
        optimizer: "sgd" as in the program, "adamw", "lars", "lamb", or a callable.
        lr: Learning rate, absolute; None is the program's 0.12 x global batch / 256.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up; the program has none.
    """

    base_lr: ClassVar[float] = 0.12

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
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
        check_not_negative("align_weight", align_weight)
        check_not_negative("uniform_weight", uniform_weight)
        check_positive("alpha", alpha, "The paper uses 2")
        check_positive("t", t, "The paper uses 2")
        self.align_weight, self.uniform_weight, self.alpha, self.t = align_weight, uniform_weight, alpha, t
        self.projector = projector or moco_head(self.feature_dim, None, projection_dim, layers=1)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the weighted sum of alignment and uniformity."""
        view_a, view_b = self.views(batch, count=2)
        features = self.backbone(torch.cat([view_a, view_b]))  # (2B, F): BatchNorm sees both views, as in the program
        projection_a, projection_b = self.projector(features).chunk(2)  # (B, D) each
        align = alignment(projection_a, projection_b, alpha=self.alpha)
        uniform = (uniformity(projection_a, t=self.t) + uniformity(projection_b, t=self.t)) / 2
        loss = self.align_weight * align + self.uniform_weight * uniform
        for name, value in (("loss", loss), ("alignment", align), ("uniformity", uniform)):
            self.log(f"train/{name}", value, batch_size=len(view_a))
        return {"loss": loss, "features": features[: len(view_a)].detach()}

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the warm-up, then a tenth at each milestone."""
        if step < warmup_steps:
            return super().lr_factor(step, warmup_steps, total_steps)
        return step_decay(step, [round(share * total_steps) for share in _MILESTONES])
