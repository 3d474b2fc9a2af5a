"""SupCon: views of images of one class attract, all others of the global batch repel.

Paper: https://arxiv.org/abs/2004.11362.
Reference program: HobbitLong/SupContrast.
Differs from it: norms and biases carry no weight decay; the schedule moves every step and not every epoch, and its
warm-up starts at 2 % of the rate (the program's 0.01 of 0.5) for every batch size.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_positive
from lightning_contrast.contracts import require_labels
from lightning_contrast.losses import sup_con
from lightning_contrast.methods.base import SelfSupervisedModule, temperature_of
from lightning_contrast.nn import supcon_head
from lightning_contrast.nn.temperature import Temperature, check_temperature, with_constant_factor
from lightning_contrast.optim import OptimizerLike, warmup_cosine


class SupCon(SelfSupervisedModule):
    """Contrast the images of a class with those of the others.

    A batch holds two views (B, C, h, w) and labels (B,); `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        projection_dim: D, the width of the projection.
        projector: A module (B, F) -> (B, D) in the place of the head.
        temperature: Divisor of the cosine similarities, > 0. A number, `nn.LearnedTemperature`,
            `nn.ScheduledTemperature`, or a function of the optimizer step.
        base_temperature: The loss is multiplied by ``temperature / base_temperature`` as in the program, > 0; None:
            by 1. A learned temperature takes this factor for a constant.
        optimizer: "sgd" as in the program, "adamw", "lars", "lamb", or a callable.
        lr: Learning rate after the warm-up, absolute; None is the program's 0.5 for 1,024 images, scaled.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.001 of the rate.
    """

    base_lr: ClassVar[float] = 0.125

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        temperature: Temperature = 0.1,
        base_temperature: float | None = 0.07,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 1e-4,
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
        if base_temperature is not None:
            check_positive("base_temperature", base_temperature)
        self.temperature, self.base_temperature = check_temperature(temperature), base_temperature
        self.projector = projector or supcon_head(self.feature_dim, None, projection_dim)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the supervised contrastive loss of a batch of two views with labels."""
        view_a, view_b = self.views(batch, count=2)
        labels = require_labels(batch, "SupCon")  # (B,)
        features = self.backbone(torch.cat([view_a, view_b]))  # (2B, F): BatchNorm sees both views, as in the program
        projection_a, projection_b = self.projector(features).chunk(2)  # (B, D) each
        temperature, base = temperature_of(self), self.base_temperature
        loss = sup_con(projection_a, projection_b, labels, temperature=temperature, base_temperature=base)
        if base is not None:
            loss = with_constant_factor(loss, temperature)
        self.log("train/loss", loss, batch_size=len(view_a))
        return {"loss": loss, "features": features[: len(view_a)].detach()}

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the program's warm-up from 2 % and cosine to 0.1 %."""
        return warmup_cosine(step, warmup_steps, total_steps, start=0.02, end=0.001)
