"""MoCHi: MoCo v2 with synthetic negatives, mixed from the hardest negatives of the queue.

Paper: https://arxiv.org/abs/2010.01028; there is no public implementation.
Differs from MoCo's reference implementation as `MoCo` does.
"""

import copy
from typing import Any, ClassVar, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_probability
from lightning_contrast.augment import moco_v2_views
from lightning_contrast.callbacks import MomentumUpdate, QueueUpdate
from lightning_contrast.losses import info_nce, mochi_negatives
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import FeatureQueue, build_head, convert_split_batchnorm
from lightning_contrast.nn.feature_queue import QueueDtype
from lightning_contrast.nn.shuffle_batchnorm import Shuffle
from lightning_contrast.nn.temperature import Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.runtime.temperature import current_temperature


class MoCHi(SelfSupervisedModule):
    """Contrast a query with its key, a queue of past keys, and mixtures of its hardest negatives.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        projection_dim: D, the width of the projection, also of a custom ``projector``.
        projector: A module (B, F) -> (B, D) that replaces the head; the EMA network gets a copy.
        momentum: EMA momentum of the key encoder, in [0, 1].
        queue_size: Number K of past keys, at least those of one step on all ranks.
        queue_dtype: "float32", "float16", "int8" or "int4".
        temperature: Divisor of the cosine similarities, > 0. A number, `nn.LearnedTemperature`,
            `nn.ScheduledTemperature`, or a function of the optimizer step.
        hardest: Number of hardest negatives per query to mix, >= 2; N in the paper.
        pair_mixes: Number of mixtures of two of them, >= 0; s in the paper.
        query_mixes: Number of mixtures of one of them with the query, >= 0; s' in the paper.
        start_epoch: First epoch (from 0) with synthetic negatives, >= 1, since the queue starts empty.
        shuffle: See `MoCo`.
        batchnorm_splits: See `MoCo`.
        optimizer: "sgd" as in the paper, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.03 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up; the paper has none.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.03
    views = staticmethod(moco_v2_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        momentum: float = 0.999,
        queue_size: int = 65536,
        queue_dtype: QueueDtype = "float32",
        temperature: Temperature = 0.2,
        hardest: int = 1024,
        pair_mixes: int = 1024,
        query_mixes: int = 128,
        start_epoch: int = 10,
        shuffle: bool = True,
        batchnorm_splits: int = 1,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_probability("momentum", momentum)
        check_at_least("queue_size", queue_size, 2)
        check_at_least("hardest", hardest, 2)
        check_at_least("pair_mixes", pair_mixes, 0)
        check_at_least("query_mixes", query_mixes, 0)
        check_at_least("start_epoch", start_epoch, 1)
        check_at_least("batchnorm_splits", batchnorm_splits, 1)
        self.momentum, self.temperature, self.start_epoch = momentum, check_temperature(temperature), start_epoch
        self.hardest, self.pair_mixes, self.query_mixes = hardest, pair_mixes, query_mixes
        self.shuffle, self.batchnorm_splits = shuffle, batchnorm_splits
        if batchnorm_splits > 1:
            self.backbone = convert_split_batchnorm(self.backbone, batchnorm_splits)
        self.projector = projector or build_head("moco", self.feature_dim, out_dim=projection_dim)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.queue = FeatureQueue(queue_size, projection_dim, queue_dtype)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the InfoNCE loss of two views, features (B, F), and keys (B, D) for the queue."""
        view_q, view_k = self.batch_views(batch, count=2)
        features = self.backbone(view_q)  # (B, F)
        query = self.projector(features)  # (B, D)
        keys = self._keys(view_k)  # (B, D)
        mixtures = self._mixtures(query) if self.current_epoch >= self.start_epoch else None  # (B, s + s', D)
        empty = self.queue.is_empty  # in the first step, whose negatives are the other keys of all ranks
        loss = info_nce(
            query,
            keys,
            None if empty else self.queue.features,
            temperature=current_temperature(self),
            negatives_mask=None if empty else self.queue.mask,
            extra_negatives=mixtures,
        )
        self.log("train/loss", loss, batch_size=len(view_q))
        # MomentumUpdate moves the key encoder after the optimizer step; QueueUpdate pushes "keys" after the batch.
        return {"loss": loss, "features": features.detach(), "keys": keys}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (query, key) modules."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def queues(self) -> dict[str, nn.Module]:
        """Return the queue of past keys."""
        return {"keys": self.queue}

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback and the queue callback."""
        return [MomentumUpdate(self.momentum, schedule="constant"), QueueUpdate()]

    def on_fit_start(self) -> None:
        """Warn about per-rank BatchNorm statistics only without shuffling, which relies on them."""
        if not self.shuffle:
            super().on_fit_start()

    def _mixtures(self, query: Tensor) -> Tensor:
        """Return the synthetic negatives of each query, (B, s + s', D)."""
        return mochi_negatives(
            query,
            self.queue.features,
            hardest=self.hardest,
            pair_mixes=self.pair_mixes,
            query_mixes=self.query_mixes,
            negatives_mask=self.queue.mask,
        )

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """Return the unit-length keys of a view, (B, D)."""
        shuffles = self.shuffle and (self.batchnorm_splits > 1 or distributed.is_distributed())
        shuffle = Shuffle(len(view), view.device) if shuffles else None
        view = view if shuffle is None else shuffle(view)
        keys = unit_rows(self.momentum_projector(self.momentum_backbone(view)))
        return keys if shuffle is None else shuffle.undo(keys)
