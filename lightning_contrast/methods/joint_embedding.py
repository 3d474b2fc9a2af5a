"""Base class of the methods that are one loss of the projections of all views: LeJEPA, VISReg, W-MSE, MMCR, TiCo."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast import optim
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, build_head
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.seeding import derived_seed


class JointEmbeddingOptions(MethodOptions, total=False):
    """Keyword arguments that the joint-embedding methods share.

    Attributes:
        head_norm: Norm of the projector's hidden layers, "batch" (default), "layer" or None.
        projector: A module (N, F) -> (N, D) that replaces the head.
        lr: Peak learning rate, absolute; None (default) is the method's, scaled with the global batch.
        warmup_epochs: Epochs of linear warm-up before the method's schedule; None (default) is the method's number,
            fewer in short runs.
    """

    head_norm: Norm
    projector: nn.Module | None
    lr: float | None
    warmup_epochs: int | None


class JointEmbeddingModule(SelfSupervisedModule):
    """Backbone, projector, and one loss of the projections of all views of a batch.

    A batch holds two or more global views (B, C, h, w) of one size and any number of smaller local views after them;
    `forward` gives features (B, F). A subclass defines `view_loss`.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        head: Name of the projector in `nn.build_head`.
        hidden_dim: Width of the projector's hidden layers.
        projection_dim: D, the width of the projection.
        head_norm: Norm of the projector's hidden layers, "batch", "layer" or None.
        projector: A module (N, F) -> (N, D) that replaces the head.
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the method's, scaled with the global batch.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up; None is the method's number, fewer in short runs.
        **options: See `MethodOptions`.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        head: str,
        hidden_dim: int,
        projection_dim: int,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        optimizer: OptimizerLike,
        lr: float | None = None,
        weight_decay: float,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        self.projector = projector or build_head(
            head, self.feature_dim, hidden_dim=hidden_dim, out_dim=projection_dim, norm=head_norm
        )

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of all views, and features (B, F) of the first."""
        views = self.batch_crops(batch)  # V x (B, C, h, w)
        features = self.view_features(views)  # V x (B, F)
        projections = self.projector(torch.cat(features)).unflatten(0, (len(views), -1))  # (V, B, D)
        # Equal on all ranks, which share slices and permutations, and after a resume.
        generator = torch.Generator().manual_seed(derived_seed(self.global_step, batch_idx))
        loss = self.view_loss(projections, views, generator)
        self.log("train/loss", loss, batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}

    def view_features(self, views: list[Tensor]) -> list[Tensor]:
        """Return the features of each view, (B, F); views of one size share a forward pass and its BatchNorm."""
        return forward_by_size(self.backbone, views)

    def view_loss(self, projections: Tensor, views: list[Tensor], generator: torch.Generator) -> Tensor:
        """Return the loss of a step, a scalar.

        Args:
            projections: Projections of all views, (V, B, D).
            views: The views, each (B, C, h, w), the global ones first.
            generator: Generator of the CPU for the draws of this step, equal on all ranks.
        """
        raise NotImplementedError

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up from 0, then a cosine to 0.001."""
        return optim.warmup_cosine(step, warmup_steps, total_steps, end=0.001)
