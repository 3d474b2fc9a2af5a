"""MoCo v3: predictions are contrasted with the EMA encoder's keys of the global batch, without a queue.

Paper: https://arxiv.org/abs/2104.02057. Reference implementation: facebookresearch/moco-v3.
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
from lightning_contrast.nn.multi_crop import forward_each
from lightning_contrast.nn.temperature import Temperature, check_temperature, with_constant_factor
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options
from lightning_contrast.runtime.temperature import current_temperature


class MoCoV3(SelfSupervisedModule):
    """Contrast predictions with the EMA encoder's keys of the other view.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F). Arguments that are None follow the paper's
    recipe for ResNets, or its recipe for ViTs where the backbone has a patch embedding.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the hidden layers of projector and predictor.
        projection_dim: D, the width of projection and prediction, also of a custom ``projector``.
        head_norm: Norm of the heads' layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) that replaces the head; the EMA network gets a copy.
        predictor: A module (B, D) -> (B, D) that replaces the predictor.
        freeze_patches: Freeze a ViT's patch projection, if it is one convolution, at its initialization, for stability.
        momentum: EMA momentum of the key encoder at the first step, in [0, 1]; rises to 1 as a cosine.
        temperature: Divisor of the cosine similarities, > 0, or as in `SimCLR`; None is 1 (ResNet) or 0.2 (ViT). In the
            loss's factor of twice the temperature a `nn.LearnedTemperature` is a constant.
        optimizer: "sgd", "adamw", "lars", "lamb", or a callable; None is "lars" (ResNet) or "adamw" (ViT).
        lr: Peak learning rate, absolute; None is 0.6 (ResNet, 100 epochs) or 1.5e-4 (ViT) x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases; None is 1e-6 (ResNet) or 0.1 (ViT).
        warmup_epochs: Epochs of linear warm-up before the cosine; None is 10 (ResNet) or 40 (ViT), fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.6
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
        vit = getattr(network.module, "patch_embed", None) is not None
        recipe: tuple[OptimizerLike, float, float] = ("adamw", 0.1, 0.2) if vit else ("lars", 1e-6, 1.0)
        chosen, decay = optimizer or recipe[0], recipe[1] if weight_decay is None else weight_decay
        super().__init__(network, optimizer=chosen, lr=lr, weight_decay=decay, warmup_epochs=warmup_epochs, **options)
        check_probability("momentum", momentum)
        self.momentum, self.temperature = momentum, check_temperature(recipe[2] if temperature is None else temperature)
        head: dict[str, Any] = {"hidden_dim": hidden_dim, "out_dim": projection_dim, "norm": head_norm}
        if vit:
            self.base_lr, self.default_warmup_epochs = 1.5e-4, 40  # type: ignore[misc]  # of this instance
        if freeze_patches and isinstance(patches := getattr(network.module, "patch_embed", None), PatchEmbed):
            patches.proj.requires_grad_(False)
        self.projector = projector or build_head("moco_v3_projector", self.feature_dim, layers=3 if vit else 2, **head)
        last_norm: Any = "plain" if vit else None
        self.predictor = predictor or build_head("moco_v3_predictor", projection_dim, last_norm=last_norm, **head)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the sum of both directions' losses, times twice the temperature, and features (B, F)."""
        views = self.batch_views(batch, count=2)
        features, _, queries = forward_each(views, self.backbone, self.projector, self.predictor)  # 2 x (B, F or D)
        with torch.no_grad():
            _, keys = forward_each(views, self.momentum_backbone, self.momentum_projector)  # 2 x (B, D)
        temperature = current_temperature(self)
        loss = with_constant_factor(moco_v3_loss(*queries, *keys, temperature=temperature), temperature)
        self.log("train/loss", loss, batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}  # MomentumUpdate follows the optimizer step

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (query, key) modules; the predictor has no EMA copy."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback."""
        return [MomentumUpdate(self.momentum)]
