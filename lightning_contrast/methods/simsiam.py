"""SimSiam: a predictor on one view, a stop-gradient on the other, without negatives or an EMA network.

Paper: https://arxiv.org/abs/2011.10566.
Reference implementation: facebookresearch/simsiam.
Differs from it: no weight decay on norms and biases; the cosine is updated every step instead of every epoch; the
backbone decides whether the last norm of each residual block starts at zero (timm's ResNets: ``zero_init_last``).
"""

from typing import Any, ClassVar, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast import optim
from lightning_contrast.augment import simsiam_views
from lightning_contrast.losses import negative_cosine
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, build_head
from lightning_contrast.nn.multi_crop import forward_each, mean_loss, view_pairs
from lightning_contrast.runtime.method_options import MethodOptions


class SimSiam(SelfSupervisedModule):
    """Predict the projection of one view from the other, with a stop-gradient.

    A batch holds two or more global views (B, C, h, w) of one size and any number of smaller local views after them;
    `forward` gives features (B, F). Predictions of all views, global and local, are compared with the projections
    of the other global views; the loss is the mean over these pairs. Logs ``train/projection_std``, the mean standard
    deviation of the normalized projection's dimensions times sqrt(D): about 1, or 0 in a collapse.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        head_layers: Layers of the projector; the paper has 3 on ImageNet and 2 on CIFAR-10.
        projection_dim: D, the width of projection and prediction, also of a custom ``projector``.
        predictor_dim: Width of the predictor's bottleneck.
        head_norm: Norm of the heads' layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) that replaces the head.
        predictor: A module (B, D) -> (B, D) that replaces the predictor.
        fix_predictor_lr: Keep the predictor's learning rate constant, as in the paper's reported runs.
        optimizer: "sgd" as in the paper, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.05 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up; the paper has none.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.05
    views = staticmethod(simsiam_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
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
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        self.fix_predictor_lr = fix_predictor_lr
        self.projector = projector or build_head(
            "simsiam_projector", self.feature_dim, out_dim=projection_dim, layers=head_layers, norm=head_norm
        )
        self.predictor = predictor or build_head(
            "simsiam_predictor", projection_dim, hidden_dim=predictor_dim, norm=head_norm
        )
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the negative mean cosine similarity, in [-1, 1], and features (B, F)."""
        views = self.batch_crops(batch)  # V x (B, C, h, w)
        features, projections = forward_each(views, self.backbone, self.projector)  # V x (B, F), V x (B, D)
        predictions = [self.predictor(projection) for projection in projections]  # V x (B, D)
        pairs = view_pairs(views, both_ways=True)
        loss = mean_loss(negative_cosine(predictions[i], projections[j]) for i, j in pairs)
        self.log("train/loss", loss, batch_size=len(views[0]))
        self.log("train/projection_std", _spread(projections[0]), batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the encoder's groups and the predictor's, whose learning rate is constant."""
        groups = super().parameter_groups()
        if not self.fix_predictor_lr:
            return groups
        predictor = set(self.predictor.parameters())
        encoder = [group | {"params": [p for p in group["params"] if p not in predictor]} for group in groups]
        fixed = [group | {"params": [p for p in group["params"] if p in predictor]} for group in groups]
        return encoder + [group | {"fixed_lr": True} for group in fixed]


def _spread(projection: Tensor) -> Tensor:
    """Return the mean standard deviation of the normalized dimensions of (B, D), times sqrt(D)."""
    unit = F.normalize(projection.detach().float(), dim=1)
    return unit.std(0, correction=0).mean() * float(projection.shape[1] ** 0.5)
