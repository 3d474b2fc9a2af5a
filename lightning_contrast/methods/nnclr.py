"""NNCLR: the positive of a view is the nearest neighbor of the other view in a queue of past projections.

Paper: https://arxiv.org/abs/2104.14548; there is no public implementation.
Differs from it: the queue starts empty instead of random; while it is empty, a projection is its own neighbor. The
cross-entropy is over the predictions for each neighbor, not also over the neighbors for each prediction.
"""

from typing import Any, ClassVar, Unpack

import lightning as L
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least
from lightning_contrast.augment import simclr_views
from lightning_contrast.callbacks import QueueUpdate
from lightning_contrast.losses import info_nce
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.metrics.neighbours import nearest_row
from lightning_contrast.nn import FeatureQueue, Norm, build_head
from lightning_contrast.nn.feature_queue import QueueDtype
from lightning_contrast.nn.multi_crop import count_global_views, forward_each, mean_loss, view_pairs
from lightning_contrast.nn.temperature import Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.runtime.temperature import current_temperature


class NNCLR(SelfSupervisedModule):
    """Contrast the nearest neighbors of one view's projections with the other view's predictions.

    A batch holds two or more global views (B, C, h, w) of one size and any number of smaller local views after them;
    `forward` gives features (B, F). Predictions of all views, global and local, are contrasted with the neighbors
    of the other global views; the loss is the mean over these pairs. The queue gets the projections of the first view.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the projector's hidden layers.
        predictor_dim: Width of the predictor's hidden layer.
        projection_dim: D, the width of projection and prediction, also of a custom ``projector``.
        head_norm: Norm of the heads' layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) that replaces the head.
        predictor: A module (B, D) -> (B, D) that replaces the predictor.
        queue_size: Number K of past projections, at least those of one step on all ranks.
        queue_dtype: "float32", "float16", "int8" or "int4".
        temperature: Divisor of the cosine similarities, > 0; a number, or as the ``temperature`` of `SimCLR`.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.3 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; None is 10, fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.3
    views = staticmethod(simclr_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        hidden_dim: int = 2048,
        predictor_dim: int = 4096,
        projection_dim: int = 256,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
        queue_size: int = 98304,
        queue_dtype: QueueDtype = "float32",
        temperature: Temperature = 0.1,
        optimizer: OptimizerLike = "lars",
        lr: float | None = None,
        weight_decay: float = 1e-6,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_at_least("queue_size", queue_size, 1)
        self.temperature = check_temperature(temperature)
        self.projector = projector or build_head(
            "nnclr_projector", self.feature_dim, hidden_dim=hidden_dim, out_dim=projection_dim, norm=head_norm
        )
        self.predictor = predictor or build_head(
            "nnclr_predictor", projection_dim, hidden_dim=predictor_dim, out_dim=projection_dim, norm=head_norm
        )
        self.queue = FeatureQueue(queue_size, projection_dim, queue_dtype)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean InfoNCE loss of pairs of views, features (B, F), and keys (B, D) for the queue."""
        views = self.batch_crops(batch)  # V x (B, C, h, w)
        features, projections = forward_each(views, self.backbone, self.projector)  # V x (B, F), V x (B, D)
        predictions = [self.predictor(projection) for projection in projections]  # V x (B, D)
        keys = projections[: count_global_views(views)]
        neighbors = [nearest_row(key, self.queue.features, self.queue.mask) for key in keys]  # G x (B, D), no gradient
        temperature, pairs = current_temperature(self), view_pairs(views, both_ways=True)
        loss = mean_loss(info_nce(neighbors[j], predictions[i], temperature=temperature) for i, j in pairs)
        self.log("train/loss", loss, batch_size=len(views[0]))
        # QueueUpdate pushes "keys" into the queue after the batch.
        return {"loss": loss, "features": features[0].detach(), "keys": unit_rows(projections[0].detach())}

    def queues(self) -> dict[str, nn.Module]:
        """Return the queue of past projections."""
        return {"keys": self.queue}

    def default_callbacks(self) -> list[L.Callback]:
        """Return the queue callback."""
        return [QueueUpdate()]
