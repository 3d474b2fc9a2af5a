"""SupCon: images of one class are contrasted with all other images of the global batch.

Paper: https://arxiv.org/abs/2004.11362.
Reference implementation: HobbitLong/SupContrast.
Differs from it: no weight decay on norms and biases; the schedule is updated every step instead of every epoch, and its
warm-up starts at 2 % of the peak (the reference's 0.01 of 0.5) for every batch size.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_positive
from lightning_contrast.augment import simclr_views
from lightning_contrast.contracts import require_labels
from lightning_contrast.losses import sup_con
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import build_head
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.nn.temperature import Temperature, check_temperature, with_constant_factor
from lightning_contrast.optim import OptimizerLike, warmup_cosine
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.runtime.temperature import current_temperature


class SupCon(SelfSupervisedModule):
    """Contrast the images of each class with those of all other classes.

    A batch holds labels (B,), two or more global views (B, C, h, w) of one size, and any number of smaller local views
    after them; `forward` gives features (B, F). As in Eq. 2, every view is an anchor, and all other views of its image
    and of all images of its class are its positives, local or not; the loss is the mean over all views of all images.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        projection_dim: D, the width of the projection.
        projector: A module (B, F) -> (B, D) that replaces the head.
        temperature: Divisor of the cosine similarities, > 0. A number, `nn.LearnedTemperature`,
            `nn.ScheduledTemperature`, or a function of the optimizer step.
        base_temperature: Multiply the loss by ``temperature / base_temperature`` as in the reference, > 0; None: by 1.
            No gradient of this factor reaches a learned temperature.
        optimizer: "sgd" as in the reference implementation, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the reference's 0.5 for 1,024 images, scaled.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.001 of the peak; None is 10, fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.125
    views = staticmethod(simclr_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        temperature: Temperature = 0.1,
        base_temperature: float | None = 0.07,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        if base_temperature is not None:
            check_positive("base_temperature", base_temperature)
        self.temperature, self.base_temperature = check_temperature(temperature), base_temperature
        self.projector = projector or build_head("supcon", self.feature_dim, out_dim=projection_dim)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the supervised contrastive loss of all views with labels, and features (B, F)."""
        views = self.batch_crops(batch)  # V x (B, C, h, w)
        labels = require_labels(batch, "SupCon")  # (B,)
        features = forward_by_size(self.backbone, views)  # V x (B, F): BatchNorm sees both views, as in the reference
        projections = self.projector(torch.cat(features)).chunk(len(views))  # V x (B, D)
        temperature, base = current_temperature(self), self.base_temperature
        loss = sup_con(*projections, labels=labels, temperature=temperature, base_temperature=base)
        if base is not None:
            loss = with_constant_factor(loss, temperature)
        self.log("train/loss", loss, batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up from 2 %, then a cosine to 0.1 %."""
        return warmup_cosine(step, warmup_steps, total_steps, start=0.02, end=0.001)
