"""MoCo: a query attracts the key of its image from a slowly moving network and repels the keys of a queue.

Papers: https://arxiv.org/abs/1911.05722 (v1), https://arxiv.org/abs/2003.04297 (v2).
Reference program: facebookresearch/moco, and its CIFAR-10 demo for the symmetric form and BatchNorm in splits.
Differs from it: the momentum network moves after the optimizer step and not before the next keys, which gives the same
keys; the queue starts empty and not random; norms and biases carry no weight decay; the cosine moves every step and
not every epoch; v1's rate falls at 60 % and 80 % of any run, not at epochs 120 and 160.
"""

import copy
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_choice, check_probability
from lightning_contrast.callbacks import MomentumUpdate, QueueUpdate
from lightning_contrast.losses import Negatives, info_nce
from lightning_contrast.losses.negatives import as_negatives
from lightning_contrast.methods.base import SelfSupervisedModule, temperature_of
from lightning_contrast.methods.false_negatives import SameImages, check_mask_same, groups_of, marks_of
from lightning_contrast.nn import FeatureQueue, convert_split_batchnorm, moco_head
from lightning_contrast.nn.feature_queue import QueueDtype
from lightning_contrast.nn.shuffle_batchnorm import Shuffle
from lightning_contrast.nn.temperature import Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike, step_decay
from lightning_contrast.precision import unit_rows


class MoCo(SelfSupervisedModule):
    """Contrast a query with its key and a queue of past keys.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        head_layers: Layers of the projector: 1 is MoCo v1 (with its temperature and its schedule), 2 is MoCo v2.
        projection_dim: D, the width of the projection, also of a ``projector`` of your own.
        projector: A module (B, F) -> (B, D) in the place of the head; the momentum network gets a copy.
        momentum: Share of the momentum network that each step keeps, in [0, 1].
        queue_size: Number K of past keys, at least those of one step on all ranks.
        queue_dtype: "float32", "float16" or "int8".
        temperature: Divisor of the cosine similarities, > 0; None is the paper's 0.07 (v1) or 0.2 (v2). A number,
            `nn.LearnedTemperature`, `nn.ScheduledTemperature`, or a function of the optimizer step.
        weighting: How the queue's keys count: a `losses.Negatives`, or the name of one.
        mask_same: Which keys are known to show the same and do not count as negatives: those of images with the same
            "label" or "index" in the batch; None: all count. A label below 0 is unknown.
        symmetric: Both views are queries and keys; the two losses are added and both keys enter the queue.
        shuffle: Exchange the images of all ranks before the keys are made, so that queries and keys do not share
            BatchNorm statistics. On one process it needs ``batchnorm_splits`` to have an effect.
        batchnorm_splits: Parts of a batch that BatchNorm treats apart, as that many devices would; 8 in the demo.
        optimizer: "sgd" as in the paper, "adamw", "lars", "lamb", or a callable.
        lr: Learning rate, absolute; None is the paper's 0.03 x global batch / 256.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up; the paper has none.
    """

    base_lr: ClassVar[float] = 0.03

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        head_layers: int = 2,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        momentum: float = 0.999,
        queue_size: int = 65536,
        queue_dtype: QueueDtype = "float32",
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
        check_choice("head_layers", head_layers, (1, 2))
        check_probability("momentum", momentum)
        check_at_least("queue_size", queue_size, 1)
        check_at_least("batchnorm_splits", batchnorm_splits, 1)
        if temperature is None:
            temperature = 0.07 if head_layers == 1 else 0.2
        self.head_layers, self.momentum, self.temperature = head_layers, momentum, check_temperature(temperature)
        self.weighting, self.mask_same = as_negatives(weighting), check_mask_same(mask_same)
        self.symmetric, self.keys_per_image = symmetric, 1 + symmetric
        self.shuffle, self.batchnorm_splits = shuffle, batchnorm_splits
        if batchnorm_splits > 1:
            self.backbone = convert_split_batchnorm(self.backbone, batchnorm_splits)
        self.projector = projector or moco_head(self.feature_dim, None, projection_dim, layers=head_layers)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.queue = FeatureQueue(queue_size, projection_dim, queue_dtype, labels=mask_same is not None)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the InfoNCE loss of a batch of two views, and the keys for the queue."""
        view_q, view_k = self.views(batch, count=2)
        features = self.backbone(view_q)  # (B, F)
        keys = self._keys(view_k)  # (B, D)
        temperature, groups = temperature_of(self), groups_of(batch, self.mask_same, "MoCo")  # groups (B,)
        loss = self._loss(self.projector(features), keys, temperature, groups)
        if self.symmetric:
            other_keys = self._keys(view_q)  # (B, D)
            loss = loss + self._loss(self.projector(self.backbone(view_k)), other_keys, temperature, groups)
            keys = torch.stack([keys, other_keys], dim=1).flatten(0, 1)  # (2B, D): by image, as several ranks would
        self.log("train/loss", loss, batch_size=len(view_q))
        outputs = {"loss": loss, "features": features.detach(), "keys": keys}
        if self.mask_same is not None:
            marks = marks_of(batch, self.mask_same, "MoCo")  # (B,)
            outputs["keys_labels"] = marks.repeat_interleave(self.keys_per_image)
        return outputs

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the encoder's parts with those that follow them."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def queues(self) -> dict[str, nn.Module]:
        """Return the queue of past keys."""
        return {"keys": self.queue}

    def default_callbacks(self) -> list[L.Callback]:
        """Return what moves the momentum network and feeds the queue."""
        return [MomentumUpdate(self.momentum, schedule="constant"), QueueUpdate()]

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return v1's falling steps or v2's cosine, after the warm-up."""
        if self.head_layers == 2 or step < warmup_steps:
            return super().lr_factor(step, warmup_steps, total_steps)
        return step_decay(step, (round(0.6 * total_steps), round(0.8 * total_steps)))

    def on_fit_start(self) -> None:
        """Warn of BatchNorm statistics of several ranks only where shuffling does not need them."""
        if not self.shuffle:
            super().on_fit_start()

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """Return the keys of a view, (B, D), of length 1."""
        shuffle = Shuffle(len(view), view.device) if self._shuffles() else None
        view = view if shuffle is None else shuffle(view)
        keys = unit_rows(self.momentum_projector(self.momentum_backbone(view)))
        return keys if shuffle is None else shuffle.undo(keys)

    def _shuffles(self) -> bool:
        """Tell whether shuffling changes anything: without parts, one process normalises the whole batch at once."""
        return self.shuffle and (self.batchnorm_splits > 1 or distributed.is_distributed())

    def _loss(self, query: Tensor, keys: Tensor, temperature: float | Tensor, groups: Tensor | None) -> Tensor:
        """Return the loss of queries (B, D) with their keys (B, D) and the queue."""
        return info_nce(
            query,
            keys,
            self.queue.features,
            temperature=temperature,
            negatives_mask=self.queue.mask,
            weighting=self.weighting,
            groups=groups,
            negatives_groups=self.queue.labels,
        )
