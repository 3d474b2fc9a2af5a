"""MoCo v3: predictions contrast with the momentum keys of the global batch; no queue.

Paper: https://arxiv.org/abs/2104.02057.
Reference program: facebookresearch/moco-v3.
Differs from it: the momentum network moves after the optimizer step; norms and biases carry no weight decay for a ViT
either; positions and start values are the backbone's own (the program has fixed sine positions, and 12 heads in its
ViT-S).
"""

import copy
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_probability
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.losses import moco_v3_loss
from lightning_contrast.methods.base import SelfSupervisedModule, temperature_of
from lightning_contrast.nn import Norm, build_backbone, moco_v3_predictor, moco_v3_projector
from lightning_contrast.nn.temperature import Temperature, check_temperature, with_constant_factor
from lightning_contrast.optim import OptimizerLike


class MoCoV3(SelfSupervisedModule):
    """Contrast predictions with the momentum network's keys of the other view.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F). The paper has one recipe for ResNets and one
    for ViTs, a backbone that cuts its images into patches: arguments that are None take that of the backbone.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        hidden_dim: Width of the hidden layers of projector and predictor.
        projection_dim: D, the width of projection and prediction, also of a ``projector`` of your own.
        head_norm: Norm of the heads' layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) in the place of the head; the momentum network gets a copy.
        predictor: A module (B, D) -> (B, D) in the place of the predictor.
        freeze_patches: A ViT's patch projection keeps its random start, which makes the training stable.
        momentum: Share of the momentum network that the first step keeps, in [0, 1]; it rises to 1 as a cosine.
        temperature: Divisor of the cosine similarities, > 0; None is 1 (ResNet) or 0.2 (ViT). A number,
            `nn.LearnedTemperature`, which takes the loss's factor of twice the temperature for a constant,
            `nn.ScheduledTemperature`, or a function of the optimizer step.
        optimizer: "sgd", "adamw", "lars", "lamb", or a callable; None is "lars" (ResNet) or "adamw" (ViT).
        lr: Learning rate after the warm-up, absolute; None is 0.6 (ResNet, 100 epochs) or 1.5e-4 (ViT) x global
            batch / 256.
        weight_decay: Of all parameters but norms and biases; None is 1e-6 (ResNet) or 0.1 (ViT).
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; None is 10 (ResNet) or 40 (ViT).
    """

    base_lr: ClassVar[float] = 0.6
    base_lr_vit: ClassVar[float] = 1.5e-4

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
        freeze_patches: bool = True,
        momentum: float = 0.99,
        temperature: Temperature | None = None,
        optimizer: OptimizerLike | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        warmup_epochs: int | None = None,
    ) -> None:
        network, feature_dim = build_backbone(
            backbone, small_images=small_images, feature_dim=feature_dim, backbone_kwargs=backbone_kwargs
        )
        patches = getattr(network, "patch_embed", None)
        vit = patches is not None
        super().__init__(
            network,
            small_images=False,  # built above
            feature_dim=feature_dim,
            backbone_kwargs=None,
            optimizer=optimizer or ("adamw" if vit else "lars"),
            lr=lr,
            weight_decay=weight_decay if weight_decay is not None else (0.1 if vit else 1e-6),
            warmup_epochs=warmup_epochs if warmup_epochs is not None else (40 if vit else 10),
        )
        self.temperature = check_temperature(temperature if temperature is not None else (0.2 if vit else 1.0))
        check_probability("momentum", momentum)
        self.vit, self.momentum = vit, momentum
        if vit:
            self.base_lr = self.base_lr_vit  # type: ignore[misc]  # that of this instance
        if patches is not None and freeze_patches:
            patches.requires_grad_(False)
        self.projector = projector or moco_v3_projector(
            feature_dim, hidden_dim, projection_dim, layers=3 if vit else 2, norm=head_norm
        )
        self.predictor = predictor or moco_v3_predictor(
            projection_dim, hidden_dim, projection_dim, last_norm=vit, norm=head_norm
        )
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the sum of both directions' contrastive losses, each times twice the temperature."""
        view_a, view_b = self.views(batch, count=2)
        features = self.backbone(view_a)  # (B, F)
        query_a = self.predictor(self.projector(features))  # (B, D)
        query_b = self.predictor(self.projector(self.backbone(view_b)))  # (B, D)
        with torch.no_grad():
            key_a = self.momentum_projector(self.momentum_backbone(view_a))  # (B, D)
            key_b = self.momentum_projector(self.momentum_backbone(view_b))  # (B, D)
        temperature = temperature_of(self)
        loss = moco_v3_loss(query_a, query_b, key_a, key_b, temperature=temperature)
        loss = with_constant_factor(loss, temperature)
        self.log("train/loss", loss, batch_size=len(view_a))
        return {"loss": loss, "features": features.detach()}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the encoder's parts with those that follow them; the predictor has none."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def default_callbacks(self) -> list[L.Callback]:
        """Return what moves the momentum network."""
        return [MomentumUpdate(self.momentum)]
