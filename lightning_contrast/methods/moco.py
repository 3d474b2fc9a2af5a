"""MoCo: a query matches its key from an EMA encoder against the keys of a queue.

Papers: https://arxiv.org/abs/1911.05722 (v1), https://arxiv.org/abs/2003.04297 (v2).
Reference implementation: facebookresearch/moco; its CIFAR-10 demo for the symmetric loss and split BatchNorm.
Differs from it: the EMA update follows the optimizer step instead of preceding the next keys, with the same result; the
queue starts empty instead of random, and the first step uses the other keys of the batch; no weight decay on norms and
biases; the cosine is updated every step instead of every epoch; v1's learning rate drops at 60 % and 80 % of any run
instead of epochs 120 and 160.
"""

import copy
from typing import Any, ClassVar, Literal, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_choice, check_probability
from lightning_contrast.augment import moco_v2_views
from lightning_contrast.callbacks import MomentumUpdate, QueueUpdate
from lightning_contrast.losses import Negatives, info_nce
from lightning_contrast.losses.negatives import as_negatives
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.methods.false_negatives import SameImages, check_mask_same, sample_ids
from lightning_contrast.nn import BackboneOptions, FeatureQueue, build_head, convert_split_batchnorm
from lightning_contrast.nn.feature_queue import QueueDtype
from lightning_contrast.nn.multi_crop import count_global_views, mean_loss
from lightning_contrast.nn.shuffle_batchnorm import Shuffle
from lightning_contrast.nn.temperature import Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike, step_decay
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.temperature import current_temperature


class MoCo(SelfSupervisedModule):
    """Contrast a query with its key and a queue of past keys.

    A batch holds two or more global views (B, C, h, w) of one size and any number of smaller local views after them;
    `forward` gives features (B, F). The second view is the key, and all other views are its queries. With
    ``symmetric`` every global view is a key, and all other views, global and local, are its queries. Local views are
    never keys. The loss is the mean over these pairs, with ``symmetric`` twice the mean.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        head_layers: Layers of the projector: 1 is MoCo v1, 2 is MoCo v2.
        projection_dim: D, the width of the projection, also of a custom ``projector``.
        projector: A module (B, F) -> (B, D) that replaces the head; the EMA network gets a copy.
        momentum: EMA momentum of the key encoder, in [0, 1].
        queue_size: Number K of past keys, at least those of one step on all ranks.
        queue_dtype: "float32", "float16", "int8" or "int4".
        queue_sharded: Let each rank keep a part of the queue; the loss is that of the whole queue.
        temperature: Divisor of the cosine similarities, > 0; None is the paper's 0.07 (v1) or 0.2 (v2). A number,
            `nn.LearnedTemperature`, `nn.ScheduledTemperature`, or a function of the optimizer step.
        weighting: Weighting of the negatives: a `losses.Negatives`, or the name of one.
        mask_same: Do not use keys of images with the same "label" or "index" as negatives; None uses all keys. A label
            below 0 is unknown.
        symmetric: Use all global views as queries and keys; the losses of two views are added, and all keys enter the
            queue.
        shuffle: Shuffle images between ranks before computing keys, so that queries and keys do not share BatchNorm
            statistics. In a single process it only has an effect with ``batchnorm_splits``.
        batchnorm_splits: Number of splits of a batch with separate BatchNorm statistics; 8 in the demo.
        optimizer: "sgd" as in the paper, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.03 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up; the paper has none.
        lr_schedule: Learning rate after the warm-up: "steps" is divided by 10 at 60 % and 80 % of the run, "cosine"
            falls to 0, "constant" stays at the peak. None is the paper's: "steps" for ``head_layers=1`` (v1), else
            "cosine". The CIFAR-10 demo has one layer and the cosine.
        **options: See `BackboneOptions`.
    """

    base_lr: ClassVar[float] = 0.03
    lr_schedules: ClassVar = ("cosine", "steps", "constant")
    views = staticmethod(moco_v2_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        head_layers: int = 2,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        momentum: float = 0.999,
        queue_size: int = 65536,
        queue_dtype: QueueDtype = "float32",
        queue_sharded: bool = False,
        temperature: Temperature | None = None,
        weighting: Negatives | str = "uniform",
        mask_same: SameImages | None = None,
        symmetric: bool = False,
        shuffle: bool = True,
        batchnorm_splits: int = 1,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        lr_schedule: Literal["cosine", "steps", "constant"] | None = None,
        **options: Unpack[BackboneOptions],
    ) -> None:
        schedule = ("steps" if head_layers == 1 else "cosine") if lr_schedule is None else lr_schedule
        super().__init__(
            backbone,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            lr_schedule=schedule,  # type: ignore[arg-type]  # one of `lr_schedules`
            **options,
        )
        check_choice("head_layers", head_layers, (1, 2))
        check_probability("momentum", momentum)
        check_at_least("queue_size", queue_size, 1)
        check_at_least("batchnorm_splits", batchnorm_splits, 1)
        check_choice("symmetric", symmetric, (False, True))
        if temperature is None:
            temperature = 0.07 if head_layers == 1 else 0.2
        self.head_layers, self.momentum, self.temperature = head_layers, momentum, check_temperature(temperature)
        self.weighting, self.mask_same = as_negatives(weighting), check_mask_same(mask_same)
        self.symmetric, self.keys_per_image = symmetric, 1 + symmetric
        self.shuffle, self.batchnorm_splits = shuffle, batchnorm_splits
        if batchnorm_splits > 1:
            self.backbone = convert_split_batchnorm(self.backbone, batchnorm_splits)
        self.projector = projector or build_head("moco", self.feature_dim, out_dim=projection_dim, layers=head_layers)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.queue = FeatureQueue(queue_size, projection_dim, queue_dtype, mask_same is not None, queue_sharded)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the InfoNCE loss of queries and keys, features (B, F), and keys (B, D) for the queue."""
        views = self.batch_crops(batch)  # V x (B, C, h, w)
        others = range(2, count_global_views(views))
        features = self.backbone(views[0])  # (B, F)
        keys = {1: self._keys(views[1])}  # (B, D) each, by view
        queries = {0: self.projector(features)}  # (B, D) each, by view
        if self.symmetric:
            keys |= {view: self._keys(views[view]) for view in (0, *others)}
        asking = range(1 if self.symmetric else 2, len(views))
        queries |= {view: self.projector(self.backbone(views[view])) for view in asking}
        ids = sample_ids(batch, self.mask_same, "MoCo")  # (B,) or None
        temperature = current_temperature(self)
        pairs = [(i, j) for i in queries for j in keys if i != j]
        loss = mean_loss(self._loss(queries[i], keys[j], temperature, ids) for i, j in pairs)
        loss = loss * (1 + self.symmetric)  # the sum of both directions of two views
        self.log("train/loss", loss, batch_size=len(views[0]))
        rows = torch.stack(list(keys.values()), dim=1).flatten(0, 1)  # ordered by image as on several ranks
        outputs = {"loss": loss, "features": features.detach(), "keys": rows}
        if ids is not None:
            outputs["keys_labels"] = ids.repeat_interleave(len(keys))
        # MomentumUpdate moves the key encoder after the optimizer step; QueueUpdate pushes "keys" after the batch.
        return outputs

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (query, key) modules."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def queues(self) -> dict[str, nn.Module]:
        """Return the queue of past keys."""
        return {"keys": self.queue}

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback and the queue callback."""
        return [MomentumUpdate(self.momentum, schedule="constant"), QueueUpdate()]

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up, then v1's step decay or v2's cosine."""
        if self.lr_schedule == "cosine" or step < warmup_steps:
            return super().lr_factor(step, warmup_steps, total_steps)
        return step_decay(step, (round(0.6 * total_steps), round(0.8 * total_steps)))

    def on_fit_start(self) -> None:
        """Warn about per-rank BatchNorm statistics only without shuffling, which relies on them."""
        if not self.shuffle:
            super().on_fit_start()

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """Return the unit-length keys of a view, (B, D)."""
        shuffle = Shuffle(len(view), view.device) if self._shuffles() else None
        view = view if shuffle is None else shuffle(view)
        keys = unit_rows(self.momentum_projector(self.momentum_backbone(view)))
        return keys if shuffle is None else shuffle.undo(keys)

    def _shuffles(self) -> bool:
        """Return whether shuffling has an effect: one process without splits normalizes the whole batch at once."""
        return self.shuffle and (self.batchnorm_splits > 1 or distributed.is_distributed())

    def _loss(self, query: Tensor, keys: Tensor, temperature: float | Tensor, groups: Tensor | None) -> Tensor:
        """Return the loss of queries (B, D) with their keys (B, D) and the queue; an empty one with the other keys."""
        if self.queue.is_empty:  # on all ranks alike; some may have one image
            return info_nce(query, keys, temperature=temperature, weighting=self.weighting, groups=groups)
        return info_nce(
            query,
            keys,
            self.queue.features,
            temperature=temperature,
            negatives_mask=self.queue.mask,
            weighting=self.weighting,
            groups=groups,
            negatives_groups=self.queue.labels,
            negatives_sharded=self.queue.sharded,
        )
