"""TiCo: a view agrees with the EMA network's embedding of the other, away from the directions of recent batches.

Paper: https://arxiv.org/abs/2206.10698. There is no reference implementation; lightly and sayannag/TiCo-pytorch differ
in whether the batch's part of the covariance has gradient, and lose the covariance at a resume.
Differs from them: the covariance moves once per optimizer step, with the images of all ranks, and is in the checkpoint.
"""

import copy
from typing import Any, ClassVar, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast import optim
from lightning_contrast._checks import check_not_negative, check_probability
from lightning_contrast.augment import byol_views
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.losses import tico_loss
from lightning_contrast.methods.joint_embedding import JointEmbeddingModule, JointEmbeddingOptions
from lightning_contrast.nn import SecondMoment
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows


class TiCo(JointEmbeddingModule):
    """Match the EMA network's embedding of the second view, with little energy under a moving covariance.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F). The first view is embedded with gradient, the
    second by the EMA network. The covariance is a step state of `MomentumUpdate`.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the projector's hidden layer.
        projection_dim: D, the width of the embedding, also of a custom ``projector``.
        covariance_momentum: Share of the covariance that is kept at a step, in [0, 1].
        covariance_weight: Weight of the covariance term, >= 0.
        detach_covariance: Leave the batch's part of the covariance without gradient and add 1 to the loss, as lightly.
        momentum: EMA momentum of the network at the first step, in [0, 1]; rises to 1 as a cosine.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        weight_decay: Weight decay of all parameters except norms and biases.
        **options: See `JointEmbeddingOptions`. ``lr=None`` is the paper's 0.2 x global batch / 256.
    """

    base_lr: ClassVar[float] = 0.2
    views = staticmethod(byol_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        covariance_momentum: float = 0.9,
        covariance_weight: float = 8.0,
        detach_covariance: bool = False,
        momentum: float = 0.99,
        optimizer: OptimizerLike = "lars",
        weight_decay: float = 1.5e-6,
        **options: Unpack[JointEmbeddingOptions],
    ) -> None:
        super().__init__(
            backbone,
            head="tico",
            hidden_dim=hidden_dim,
            projection_dim=projection_dim,
            optimizer=optimizer,
            weight_decay=weight_decay,
            **options,
        )
        check_probability("momentum", momentum)
        check_probability("covariance_momentum", covariance_momentum)
        check_not_negative("covariance_weight", covariance_weight)
        self.momentum, self.covariance_weight = momentum, covariance_weight
        self.covariance_momentum, self.detach_covariance = covariance_momentum, detach_covariance
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.covariance = SecondMoment(projection_dim, covariance_momentum)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return TiCo's loss of the two views, features (B, F), and the EMA network's keys (B, D) for monitors."""
        query_view, key_view = self.batch_views(batch, 2)  # (B, C, h, w) each
        features = self.backbone(query_view)  # (B, F)
        query = self.projector(features)  # (B, D)
        with torch.no_grad():
            key = self.momentum_projector(self.momentum_backbone(key_view))  # (B, D)
        loss = tico_loss(
            query,
            key,
            self.covariance(query).to(torch.promote_types(query.dtype, torch.float32)),  # as of the last step
            covariance_momentum=self.covariance_momentum,
            covariance_weight=self.covariance_weight,
            detach_covariance=self.detach_covariance,
        )
        self.log("train/loss", loss, batch_size=len(query_view))
        # MomentumUpdate moves the EMA network and commits the covariance after the optimizer step.
        return {"loss": loss, "features": features.detach(), "keys": unit_rows(key)}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online, EMA) modules."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def step_states(self) -> list[nn.Module]:
        """Return the covariance, which is updated once per optimizer step."""
        return [self.covariance]

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback."""
        return [MomentumUpdate(self.momentum)]

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up from 0, then a cosine to 0."""
        return optim.warmup_cosine(step, warmup_steps, total_steps)
