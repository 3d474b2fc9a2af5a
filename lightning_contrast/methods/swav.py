"""SwAV: every view predicts to which prototypes the global views of its image are assigned, in balanced clusters.

Paper: https://arxiv.org/abs/2006.09882.
Reference program: facebookresearch/swav.
Differs from it: norms and biases carry no weight decay (they keep the trust ratio of LARS); the queue fills from the
first step on and not from its start epoch on, so that it takes part from the beginning of that epoch; it is one for all
ranks, each of which takes its share, and lives in the checkpoint; the warm-up ends one step later.
"""

from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast import distributed, optim
from lightning_contrast._checks import check_at_least, check_positive
from lightning_contrast.callbacks import QueueUpdate
from lightning_contrast.losses import swav_loss
from lightning_contrast.methods.base import SelfSupervisedModule, require_crops
from lightning_contrast.nn import FeatureQueue, Norm, Prototypes, mlp_head
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.fsdp import full_weights


class SwAV(SelfSupervisedModule):
    """Predict the codes of the two global views from all other views.

    A batch holds two global views (B, C, h, w) and then any number of local views, which may be of other sizes; none
    are needed. `forward` gives features (B, F). With fewer images in a step than prototypes, balanced codes need the
    queue: the paper has one of 3840 with batches of 256, and a learning rate of 0.6 there.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        hidden_dim: Width of the projector's hidden layer.
        projection_dim: D, the width of the projection, also of a ``projector`` of your own.
        head_norm: Norm of the hidden layer, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) in the place of the head.
        num_prototypes: Number K of prototypes, at least 2.
        freeze_prototypes_epochs: Epochs in which the prototypes get no gradient.
        queue_size: Past projections of all ranks that take part in making the codes of each global view; 0 for none,
            otherwise at least the images of one step on all ranks.
        queue_start_epoch: First epoch in which the queue takes part, if it is full by then.
        temperature: Divisor of the scores in the prediction, > 0.
        epsilon: Divisor of the scores in the codes, > 0; lower it where the loss stays at ln K.
        sinkhorn_iterations: Times that prototypes and samples are balanced, at least 1.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Learning rate after the warm-up, absolute; None is the paper's 0.3 x global batch / 256.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up, from a sixteenth of the rate, before the cosine to a thousandth.
    """

    base_lr: ClassVar[float] = 0.3

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        hidden_dim: int = 2048,
        projection_dim: int = 128,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        num_prototypes: int = 3000,
        freeze_prototypes_epochs: int = 1,
        queue_size: int = 0,
        queue_start_epoch: int = 15,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        optimizer: OptimizerLike = "lars",
        lr: float | None = None,
        weight_decay: float = 1e-6,
        warmup_epochs: int = 10,
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
        check_at_least("num_prototypes", num_prototypes, 2)
        check_at_least("freeze_prototypes_epochs", freeze_prototypes_epochs, 0)
        check_at_least("queue_size", queue_size, 0)
        check_at_least("queue_start_epoch", queue_start_epoch, 0)
        check_positive("temperature", temperature)
        check_positive("epsilon", epsilon)
        check_at_least("sinkhorn_iterations", sinkhorn_iterations, 1)
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        self.freeze_prototypes_epochs, self.queue_start_epoch = freeze_prototypes_epochs, queue_start_epoch
        widths = [self.feature_dim, hidden_dim, projection_dim]
        self.projector = projector or mlp_head(widths, norm=head_norm, hidden_bias=True)
        self.prototypes = Prototypes(projection_dim, num_prototypes)
        names = ("keys_a", "keys_b") if queue_size else ()
        self.view_queues = nn.ModuleDict({name: FeatureQueue(queue_size, projection_dim) for name in names})
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of a batch of two global and any local views, and the projections for the queues."""
        views = require_crops(self, batch, global_views=2)  # V, each (B, C, h, w)
        features = forward_by_size(self.backbone, views)  # V, each (B, F)
        projections = unit_rows(self.projector(torch.cat(features)))  # (V B, D): one BatchNorm for all views
        scores = self.prototypes(projections).chunk(len(views))  # V, each (B, K)
        queue_scores, queue_mask = self._queue_scores()
        loss = swav_loss(
            scores,
            temperature=self.temperature,
            epsilon=self.epsilon,
            iterations=self.sinkhorn_iterations,
            queue_scores=queue_scores,
            queue_mask=queue_mask,
        )
        self.log("train/loss", loss, batch_size=len(views[0]))
        self.log("train/prototype_use", self._prototype_use(scores[0]), batch_size=len(views[0]))
        keys = zip(self.queues(), projections.detach().chunk(len(views)), strict=False)  # the global views' come first
        return {"loss": loss, "features": features[0].detach()} | dict(keys)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Bring the prototypes to length 1, before each forward pass as in the program."""
        with full_weights(self, self.prototypes):
            self.prototypes.normalize()

    def on_after_backward(self) -> None:
        """Take the gradient from frozen prototypes: after DDP has reduced it, before the optimizer sees it."""
        if self.current_epoch < self.freeze_prototypes_epochs:
            self.prototypes.drop_gradient()

    def queues(self) -> dict[str, nn.Module]:
        """Return the queue of past projections of each global view, none with ``queue_size=0``."""
        return dict(self.view_queues.items())

    def default_callbacks(self) -> list[L.Callback]:
        """Return what feeds the queues."""
        return [QueueUpdate()] if self.queues() else []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups; LARS adapts them all, in the form of the program's LARC."""
        return [group | {"adapt": True, "trust_form": "B"} for group in super().parameter_groups()]

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the program's warm-up from 0.3 / 4.8 of the peak and its cosine to 0.001."""
        return optim.warmup_cosine(step, warmup_steps, total_steps, start=0.0625, end=0.001)

    @torch.no_grad()
    def _queue_scores(self) -> tuple[list[Tensor] | None, Tensor | None]:
        """Return the scores of this rank's share of each queue, (Q, K), and whether they count, (Q,).

        Every rank holds the same queues: each takes every W-th row, or they would count W times.
        """
        queues = [queue for queue in self.view_queues.values() if isinstance(queue, FeatureQueue)]
        if not queues or self.current_epoch < self.queue_start_epoch:
            return None, None
        own = slice(distributed.rank(), None, distributed.world_size())
        scores = [self.prototypes(queue.features[own]) for queue in queues]
        is_full = torch.stack([queue.mask for queue in queues]).all()  # stays on the device
        return scores, is_full.expand(len(scores[0]))

    @torch.no_grad()
    def _prototype_use(self, scores: Tensor) -> Tensor:
        """Return the effective share of the prototypes that this rank's images use, in (0, 1]; near 0 is collapse."""
        mean = (scores / self.temperature).softmax(dim=1).mean(dim=0)  # (K,)
        entropy: Tensor = torch.special.entr(mean).sum()
        return entropy.exp() / len(mean)
