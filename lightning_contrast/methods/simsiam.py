"""SimSiam: a predictor on one view, a stopped gradient on the other; neither negatives nor a momentum network.

Paper: https://arxiv.org/abs/2011.10566.
Reference program: facebookresearch/simsiam.
Differs from it: norms and biases carry no weight decay; the cosine moves every step and not every epoch; whether the
last norm of each residual block starts at zero is the backbone's matter (timm's ResNets: ``zero_init_last``).
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast import optim
from lightning_contrast.losses import negative_cosine
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, simsiam_predictor, simsiam_projector


class SimSiam(SelfSupervisedModule):
    """Predict the projection of one view from the other, with a stopped gradient.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F). Logs ``train/projection_std``, the mean
    deviation of the normalised projection's dimensions times sqrt(D): about 1 in health, 0 in collapse.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        head_layers: Layers of the projector; the paper has 3 on ImageNet and 2 on CIFAR-10.
        projection_dim: D, the width of projection and prediction, also of a ``projector`` of your own.
        predictor_dim: Width of the predictor's bottleneck.
        head_norm: Norm of the heads' layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) in the place of the head.
        predictor: A module (B, D) -> (B, D) in the place of the predictor.
        fix_predictor_lr: The predictor keeps the initial learning rate, as in the paper's reported runs.
        optimizer: "sgd" as in the paper, "adamw", "lars", "lamb", or a callable.
        lr: Learning rate, absolute; None is the paper's 0.05 x global batch / 256.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up; the paper has none.
    """

    base_lr: ClassVar[float] = 0.05

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        head_layers: int = 3,
        projection_dim: int = 2048,
        predictor_dim: int = 512,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
        fix_predictor_lr: bool = True,
        optimizer: optim.OptimizerLike = "sgd",
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
        self.fix_predictor_lr = fix_predictor_lr
        self.projector = projector or simsiam_projector(
            self.feature_dim, None, projection_dim, layers=head_layers, norm=head_norm
        )
        self.predictor = predictor or simsiam_predictor(projection_dim, predictor_dim, norm=head_norm)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return minus the mean cosine of predictions and projections, in [-1, 1]."""
        view_a, view_b = self.views(batch, count=2)
        features = self.backbone(view_a)  # (B, F)
        projection_a = self.projector(features)  # (B, D)
        projection_b = self.projector(self.backbone(view_b))  # (B, D)
        prediction_a, prediction_b = self.predictor(projection_a), self.predictor(projection_b)  # (B, D) each
        loss = (negative_cosine(prediction_a, projection_b) + negative_cosine(prediction_b, projection_a)) / 2
        self.log("train/loss", loss, batch_size=len(view_a))
        self.log("train/projection_std", _spread(projection_a), batch_size=len(view_a))
        return {"loss": loss, "features": features.detach()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the encoder's groups and the predictor's, which keep their learning rate."""
        groups = super().parameter_groups()
        if not self.fix_predictor_lr:
            return groups
        predictor = set(self.predictor.parameters())
        encoder = [group | {"params": [p for p in group["params"] if p not in predictor]} for group in groups]
        fixed = [group | {"params": [p for p in group["params"] if p in predictor]} for group in groups]
        return encoder + [group | {"fixed_lr": True} for group in fixed]


def _spread(projection: Tensor) -> Tensor:
    """Return the mean deviation over the batch of the normalised dimensions of (B, D), times sqrt(D)."""
    unit = F.normalize(projection.detach().float(), dim=1)
    return unit.std(0, correction=0).mean() * float(projection.shape[1] ** 0.5)
