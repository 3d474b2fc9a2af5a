"""RoCL: the two views of an image are contrasted together with a third one that attacks their agreement.

Paper: https://arxiv.org/abs/2006.07589. Reference implementation: Kim-Minseon/RoCL.
Differs from it: the attack has the negatives of all ranks, not only its own; no weight decay on norms and biases; the
cosine is updated every step.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_not_negative, check_positive
from lightning_contrast.augment import simclr_cifar_views
from lightning_contrast.callbacks.capture.features import paused_hooks
from lightning_contrast.losses import rocl_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import build_head
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.adversarial_pass import Attack, check_pixels, refuse_fsdp1
from lightning_contrast.runtime.method_options import MethodOptions


class RoCL(SelfSupervisedModule):
    """Contrast two views and an adversarial version of the first, which has moved away from the second.

    A batch holds two views (B, C, h, w) with pixels in 0..1, not normalized: a normalization belongs into the backbone.
    `forward` gives features (B, F). The attack runs both networks in eval mode, so BatchNorm's averages do not move,
    and the step then runs the three views in one pass. It costs ``steps`` further forward and backward passes. FSDP1,
    whose shards cannot be differentiated within a step, is refused.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the projector's hidden layer.
        projection_dim: D, the width of the projection.
        projector: A module (B, F) -> (B, D) that replaces the head.
        temperature: Divisor of the cosine similarities, > 0, of attack and loss.
        epsilon: Largest change of a pixel in 0..1, from 0 to 1.
        step_size: Change of a pixel per step of the attack, >= 0.
        steps: Steps of the attack, >= 0.
        random_start: Start the attack at a random offset.
        adversarial_weight: Weight of the contrast of the adversarial view with the second one, >= 0.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.75 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; None is 10, fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.75
    views = staticmethod(simclr_cifar_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        hidden_dim: int = 2048,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        temperature: float = 0.5,
        epsilon: float = 0.0314,
        step_size: float = 0.007,
        steps: int = 7,
        random_start: bool = True,
        adversarial_weight: float = 1 / 256,
        optimizer: OptimizerLike = "lars",
        lr: float | None = None,
        weight_decay: float = 1e-6,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_positive("temperature", temperature)
        check_not_negative("adversarial_weight", adversarial_weight)
        self.temperature, self.adversarial_weight = temperature, adversarial_weight
        self.attack = Attack(epsilon, step_size, steps, random_start)
        self.projector = projector or build_head(
            "moco", self.feature_dim, hidden_dim=hidden_dim, out_dim=projection_dim
        )
        self.save_hyperparameters()

    def on_fit_start(self) -> None:
        """Refuse FSDP1."""
        refuse_fsdp1(self.trainer, type(self).__name__)
        super().on_fit_start()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of both views and the adversarial one, and features (B, F) of the first."""
        view_a, view_b = self.batch_views(batch, 2)  # (B, C, h, w) each
        if batch_idx == 0 or view_a.device.type == "cpu":  # synchronizes with the device
            check_pixels(view_a)
        adversarial = self.adversarial(view_a, view_b, batch_idx)  # (B, C, h, w)
        features = forward_by_size(self.backbone, [view_a, view_b, adversarial])  # 3 x (B, F), one BatchNorm
        z_a, z_b, z_adversarial = self.projector(torch.cat(features)).chunk(3)  # (B, D) each
        loss = rocl_loss(z_a, z_b, z_adversarial, temperature=self.temperature)
        loss = loss + self.adversarial_weight * self.contrast(z_adversarial, z_b)
        self.log("train/loss", loss, batch_size=len(view_a))
        return {"loss": loss, "features": features[0].detach()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # gradients inside of a compiled step
    def adversarial(self, view_a: Tensor, view_b: Tensor, batch_idx: int) -> Tensor:
        """Return the first view (B, C, h, w), changed so that it disagrees with the second."""
        with paused_hooks(self):
            networks, seed = [self.backbone, self.projector], (self.global_step, batch_idx)
            return self.attack.view(networks, self.contrast, view_a, view_b, seed=seed)

    def contrast(self, z_adversarial: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of embeddings (B, D) of the adversarial and the second view, which the attack maximizes."""
        return rocl_loss(z_adversarial, z_b, temperature=self.temperature)
