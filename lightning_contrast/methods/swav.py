"""SwAV: every view predicts the balanced prototype assignments of the other global views.

Paper: https://arxiv.org/abs/2006.09882.
Reference implementation: facebookresearch/swav.
Differs from it: no weight decay on norms and biases (they keep LARS's trust ratio); the queue fills from the first step
instead of from its start epoch, so it is used from the beginning of that epoch; it is common to all ranks, which use a
share each, and part of the checkpoint; the warm-up ends one step later.
"""

from typing import Any, ClassVar, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast import distributed, optim
from lightning_contrast._checks import check_at_least, check_positive, check_probability
from lightning_contrast.augment import swav_views
from lightning_contrast.callbacks import QueueUpdate
from lightning_contrast.losses import swav_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import FeatureQueue, Norm, Prototypes, build_head
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.fsdp import full_weights
from lightning_contrast.runtime.method_options import MethodOptions


class SwAV(SelfSupervisedModule):
    """Predict the codes of the two global views from all other views.

    A batch holds two global views (B, C, h, w) and then any number of local views (or none), of any size. `forward`
    gives features (B, F). With fewer images per step than prototypes, balanced codes need the queue: for batches of 256
    the paper has one of 3840 and a learning rate of 0.6.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the projector's hidden layer.
        projection_dim: D, the width of the projection, also of a custom ``projector``.
        head_norm: Norm of the hidden layer, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) that replaces the head.
        num_prototypes: Number K of prototypes, >= 2.
        freeze_prototypes_epochs: Epochs during which the prototypes are frozen.
        queue_size: Number of past projections of all ranks that are assigned together with each global view; 0 for
            none, otherwise at least the images of one step on all ranks.
        queue_start_epoch: First epoch in which the queue is used, if it is full by then.
        temperature: Divisor of the scores in the prediction, > 0.
        epsilon: Divisor of the scores in the codes, > 0; lower it if the loss stays at ln K.
        sinkhorn_iterations: Number of Sinkhorn iterations, >= 1.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.3 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.001 of the peak; None is 10, fewer in short runs.
        warmup_start: Learning rate at the start of the warm-up as a share of its peak, in [0, 1]; the paper has
            0.3 / 4.8.
        adapt_vectors: Let LARS adapt norms and biases too, as in the paper; solo-learn does not.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.3
    views = staticmethod(swav_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
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
        warmup_epochs: int | None = None,
        warmup_start: float = 0.0625,
        adapt_vectors: bool = True,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_at_least("num_prototypes", num_prototypes, 2)
        check_at_least("freeze_prototypes_epochs", freeze_prototypes_epochs, 0)
        check_at_least("queue_size", queue_size, 0)
        check_at_least("queue_start_epoch", queue_start_epoch, 0)
        check_positive("temperature", temperature)
        check_positive("epsilon", epsilon)
        check_at_least("sinkhorn_iterations", sinkhorn_iterations, 1)
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        check_probability("warmup_start", warmup_start)
        self.warmup_start, self.adapt_vectors = warmup_start, adapt_vectors
        self.freeze_prototypes_epochs, self.queue_start_epoch = freeze_prototypes_epochs, queue_start_epoch
        self.projector = projector or build_head(
            "swav", self.feature_dim, hidden_dim=hidden_dim, out_dim=projection_dim, norm=head_norm
        )
        self.prototypes = Prototypes(projection_dim, num_prototypes)
        names = ("keys_a", "keys_b") if queue_size else ()
        self.view_queues = nn.ModuleDict({name: FeatureQueue(queue_size, projection_dim) for name in names})
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of all views, features (B, F), and projections (B, D) for the queues."""
        views = self.batch_crops(batch, global_views=2)  # V, each (B, C, h, w)
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
        # QueueUpdate pushes "keys_a" and "keys_b" into the queues after the batch.
        return {"loss": loss, "features": features[0].detach()} | dict(keys)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Normalize the prototypes before each forward pass, as in the reference implementation."""
        super().on_train_batch_start(batch, batch_idx)
        with full_weights(self, self.prototypes):
            self.prototypes.normalize()

    def on_after_backward(self) -> None:
        """Drop the gradient of frozen prototypes, after DDP has reduced it and before the optimizer step."""
        if self.current_epoch < self.freeze_prototypes_epochs:
            self.prototypes.drop_gradient()

    def queues(self) -> dict[str, nn.Module]:
        """Return the queue of past projections of each global view, none with ``queue_size=0``."""
        return dict(self.view_queues.items())

    def default_callbacks(self) -> list[L.Callback]:
        """Return the queue callback, if there is a queue."""
        return [QueueUpdate()] if self.queues() else []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups; LARS adapts them in the form of the reference's LARC."""
        groups = [group | {"trust_form": "B"} for group in super().parameter_groups()]
        return [group | {"adapt": True} if self.adapt_vectors and "bounds" not in group else group for group in groups]

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up, then a cosine to 0.001."""
        return optim.warmup_cosine(step, warmup_steps, total_steps, start=self.warmup_start, end=0.001)

    @torch.no_grad()
    def _queue_scores(self) -> tuple[list[Tensor] | None, Tensor | None]:
        """Return the scores of this rank's share of each queue, (Q, K), and their mask, (Q,).

        Every rank holds the same queues and uses every W-th row; otherwise each row would count W times.
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
        """Return the effective share of prototypes in use, in (0, 1]; near 0 indicates a collapse."""
        mean = (scores / self.temperature).softmax(dim=1).mean(dim=0)  # (K,)
        entropy: Tensor = torch.special.entr(mean).sum()
        return entropy.exp() / len(mean)
