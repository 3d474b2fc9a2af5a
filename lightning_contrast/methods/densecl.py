"""DenseCL: MoCo v2, and a contrast of the cells of the maps: each with the most similar cell of the other view.

Paper: https://arxiv.org/abs/2011.09157.
Reference implementation: WXinlong/DenseCL (in OpenSelfSup).
Differs from it: as `MoCo` does from its own, such as no weight decay on norms and biases; linear layers have PyTorch's
initialization instead of a standard deviation of 0.01.
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
from lightning_contrast.losses import dense_info_nce, info_nce
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import FeatureQueue, RegionMaps, build_head, convert_split_batchnorm
from lightning_contrast.nn.feature_queue import QueueDtype
from lightning_contrast.nn.region_maps import LAST_MAPS, project_cells
from lightning_contrast.nn.shuffle_batchnorm import Shuffle
from lightning_contrast.nn.temperature import Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import full_precision, normalize, unit_rows
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.runtime.temperature import current_temperature


class DenseCL(SelfSupervisedModule):
    """Contrast a query with its key and a queue, and every cell of its map with its match in the key's map.

    A batch holds two views (B, C, h, w) of one size; `forward` gives features (B, F). The match of a cell is the cell
    of the other view with the most similar backbone features; its negatives are the mean cells of past images. Logs
    ``train/global_loss`` and ``train/dense_loss``, of which the loss is a weighted mean.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        dense_weight: Share of the dense loss, in [0, 1].
        projection_dim: D, the width of both projections, also of custom projectors.
        projector: A module (B, F) -> (B, D) that replaces the head of the features; the EMA network gets a copy.
        dense_projector: A module (N, C') -> (N, D) that replaces the head of the cells; the EMA network gets a copy.
        region_layer: Name of the backbone's submodule whose output (B, C', h, w) has the cells; None is "layer4" of a
            ResNet, "stages" of `nn.SmallConvNet`, else the backbone itself, which must then return a map.
        region_dim: C', the number of its channels; None reads it from the last norm or convolution of the layer.
        momentum: EMA momentum of the key encoder, in [0, 1].
        queue_size: Number K of past keys, and of past mean cells, at least those of one step on all ranks.
        queue_dtype: "float32", "float16", "int8" or "int4".
        temperature: Divisor of the cosine similarities, > 0. A number, `nn.LearnedTemperature`,
            `nn.ScheduledTemperature`, or a function of the optimizer step.
        shuffle: See `MoCo`.
        batchnorm_splits: See `MoCo`.
        optimizer: "sgd" as in the paper, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.03 x global batch / 256 for ImageNet; 0.3 for COCO.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; the paper has none.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.03
    views = staticmethod(moco_v2_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        dense_weight: float = 0.5,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        dense_projector: nn.Module | None = None,
        region_layer: str | None = None,
        region_dim: int | None = None,
        momentum: float = 0.999,
        queue_size: int = 65536,
        queue_dtype: QueueDtype = "float32",
        temperature: Temperature = 0.2,
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
        check_probability("dense_weight", dense_weight)
        check_probability("momentum", momentum)
        check_at_least("queue_size", queue_size, 1)
        check_at_least("batchnorm_splits", batchnorm_splits, 1)
        self.dense_weight, self.momentum, self.temperature = dense_weight, momentum, check_temperature(temperature)
        self.shuffle, self.batchnorm_splits = shuffle, batchnorm_splits
        if batchnorm_splits > 1:
            self.backbone = convert_split_batchnorm(self.backbone, batchnorm_splits)
        self.projector = projector or build_head("moco", self.feature_dim, out_dim=projection_dim)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.maps = RegionMaps(self.backbone, region_layer, LAST_MAPS)
        self.momentum_maps = RegionMaps(self.momentum_backbone, region_layer, LAST_MAPS)
        channels = self.maps.channels(region_dim, self.feature_dim)
        self.dense_projector = dense_projector or build_head("moco", channels, out_dim=projection_dim)
        self.momentum_dense_projector = copy.deepcopy(self.dense_projector).requires_grad_(False)
        self.queue = FeatureQueue(queue_size, projection_dim, queue_dtype)
        self.dense_queue = FeatureQueue(queue_size, projection_dim, queue_dtype)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the weighted mean of both losses, features (B, F), and keys (B, D) for both queues."""
        view_q, view_k = self.batch_views(batch, count=2)
        with self.maps.recording():
            features = self.backbone(view_q)  # (B, F)
        cells = self.maps.take().flatten(2)  # (B, C', S)
        keys, key_cells, key_grid = self._keys(view_k)  # (B, D), (B, C', S), (B, D, S)
        temperature, empty = current_temperature(self), self.queue.is_empty
        whole = info_nce(
            self.projector(features),
            keys,
            None if empty else self.queue.features,
            temperature=temperature,
            negatives_mask=None if empty else self.queue.mask,
        )
        dense = dense_info_nce(
            project_cells(self.dense_projector, cells),
            key_grid,
            cells,
            key_cells,
            None if empty else self.dense_queue.features,
            temperature=temperature,
            queue_mask=None if empty else self.dense_queue.mask,
        )
        loss = (1 - self.dense_weight) * whole + self.dense_weight * dense
        for name, value in {"loss": loss, "global_loss": whole.detach(), "dense_loss": dense.detach()}.items():
            self.log(f"train/{name}", value, batch_size=len(view_q))
        # MomentumUpdate moves the key encoder after the optimizer step; QueueUpdate pushes both keys after the batch.
        return {"loss": loss, "features": features.detach(), "keys": keys, "dense_keys": _mean_cells(key_grid)}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (query, key) modules."""
        heads = (self.projector, self.momentum_projector), (self.dense_projector, self.momentum_dense_projector)
        return [(self.backbone, self.momentum_backbone), *heads]

    def queues(self) -> dict[str, nn.Module]:
        """Return the queues of past keys and of past mean cells."""
        return {"keys": self.queue, "dense_keys": self.dense_queue}

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback and the queue callback."""
        return [MomentumUpdate(self.momentum, schedule="constant"), QueueUpdate()]

    def on_fit_start(self) -> None:
        """Warn about per-rank BatchNorm statistics only without shuffling, which relies on them."""
        if not self.shuffle:
            super().on_fit_start()

    @torch.no_grad()
    def _keys(self, view: Tensor) -> list[Tensor]:
        """Return unit-length keys (B, D), backbone cells (B, C', S) and projected cells (B, D, S) of a view."""
        shuffles = self.shuffle and (self.batchnorm_splits > 1 or distributed.is_distributed())
        shuffle = Shuffle(len(view), view.device) if shuffles else None
        view = view if shuffle is None else shuffle(view)
        with self.momentum_maps.recording():
            keys = unit_rows(self.momentum_projector(self.momentum_backbone(view)))
        cells = self.momentum_maps.take().flatten(2)
        found = [keys, cells, project_cells(self.momentum_dense_projector, cells)]
        return found if shuffle is None else [shuffle.undo(rows) for rows in found]


@full_precision
def _mean_cells(cells: Tensor) -> Tensor:
    """Return the unit-length means (B, D) of cells (B, D, S)."""
    return normalize(cells.mean(2))
