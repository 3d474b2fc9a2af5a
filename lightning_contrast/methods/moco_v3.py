"""MoCo v3: predictions are contrasted with the EMA encoder's keys of the global batch, without a queue.

Paper: https://arxiv.org/abs/2104.02057.
Reference implementation: facebookresearch/moco-v3.
Differs from it: the EMA update follows the optimizer step; no weight decay on norms and biases of a ViT; positions and
initialization are the backbone's own (the reference has fixed sine-cosine positions, and 12 heads in its ViT-S).
"""

import copy
from typing import Any, ClassVar, Unpack

import lightning as L
import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from lightning_contrast._checks import check_probability
from lightning_contrast.augment import moco_v3_views
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.losses import moco_v3_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, build_backbone, build_head
from lightning_contrast.nn.temperature import Temperature, check_temperature, with_constant_factor
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options
from lightning_contrast.runtime.temperature import current_temperature


class MoCoV3(SelfSupervisedModule):
    """Contrast predictions with the EMA encoder's keys of the other view.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F). The paper has one recipe for ResNets and one
    for ViTs (backbones with a patch embedding): arguments that are None follow the recipe of the backbone.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the hidden layers of projector and predictor.
        projection_dim: D, the width of projection and prediction, also of a custom ``projector``.
        head_norm: Norm of the heads' layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) that replaces the head; the EMA network gets a copy.
        predictor: A module (B, D) -> (B, D) that replaces the predictor.
        freeze_patches: Freeze a ViT's patch projection, one convolution, at its random initialization, which stabilizes
            training. Other patch embeddings (the ResNet of a hybrid ViT, the convolutions of XCiT) are always trained,
            as in the reference implementation.
        momentum: EMA momentum of the key encoder at the first step, in [0, 1]; rises to 1 as a cosine.
        temperature: Divisor of the cosine similarities, > 0; None is 1 (ResNet) or 0.2 (ViT). A number,
            `nn.LearnedTemperature` (the loss's factor of twice the temperature is then a constant),
            `nn.ScheduledTemperature`, or a function of the optimizer step.
        optimizer: "sgd", "adamw", "lars", "lamb", or a callable; None is "lars" (ResNet) or "adamw" (ViT).
        lr: Peak learning rate, absolute; None is 0.6 (ResNet, 100 epochs) or 1.5e-4 (ViT) x global
            batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases; None is 1e-6 (ResNet) or 0.1 (ViT).
        warmup_epochs: Epochs of linear warm-up before the cosine; None is 10 (ResNet) or 40 (ViT), fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.6
    base_lr_vit: ClassVar[float] = 1.5e-4
    views = staticmethod(moco_v3_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
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
        **options: Unpack[MethodOptions],
    ) -> None:
        network = build_backbone(backbone, **backbone_options(options))
        patches = getattr(network.module, "patch_embed", None)
        vit = patches is not None
        super().__init__(
            network,
            optimizer=optimizer or ("adamw" if vit else "lars"),
            lr=lr,
            weight_decay=weight_decay if weight_decay is not None else (0.1 if vit else 1e-6),
            warmup_epochs=warmup_epochs,
            lr_schedule=options.get("lr_schedule"),
        )
        self.temperature = check_temperature(temperature if temperature is not None else (0.2 if vit else 1.0))
        check_probability("momentum", momentum)
        self.vit, self.momentum = vit, momentum
        head: dict[str, Any] = {"hidden_dim": hidden_dim, "out_dim": projection_dim, "norm": head_norm}
        if vit:
            self.base_lr = self.base_lr_vit  # type: ignore[misc]  # of this instance
            self.default_warmup_epochs = 40  # type: ignore[misc]  # of this instance
        if isinstance(patches, PatchEmbed) and freeze_patches:
            patches.proj.requires_grad_(False)
        self.projector = projector or build_head("moco_v3_projector", self.feature_dim, layers=3 if vit else 2, **head)
        self.predictor = predictor or build_head(
            "moco_v3_predictor", projection_dim, last_norm="plain" if vit else None, **head
        )
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the sum of both directions' losses, times twice the temperature, and features (B, F)."""
        view_a, view_b = self.batch_views(batch, count=2)
        features = self.backbone(view_a)  # (B, F)
        query_a = self.predictor(self.projector(features))  # (B, D)
        query_b = self.predictor(self.projector(self.backbone(view_b)))  # (B, D)
        with torch.no_grad():
            key_a = self.momentum_projector(self.momentum_backbone(view_a))  # (B, D)
            key_b = self.momentum_projector(self.momentum_backbone(view_b))  # (B, D)
        temperature = current_temperature(self)
        loss = moco_v3_loss(query_a, query_b, key_a, key_b, temperature=temperature)
        loss = with_constant_factor(loss, temperature)
        self.log("train/loss", loss, batch_size=len(view_a))
        # MomentumUpdate moves the key encoder after the optimizer step.
        return {"loss": loss, "features": features.detach()}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (query, key) modules; the predictor has no EMA copy."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback."""
        return [MomentumUpdate(self.momentum)]
