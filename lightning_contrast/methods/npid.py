"""NPID: instance discrimination with a memory bank, the running average of each image's features.

Paper: https://arxiv.org/abs/1805.01978.
Reference implementation: zhirongw/lemniscate.pytorch.
Differs from it: bank rows are normalized before use, which has no effect once they were written; if an image occurs
twice in a batch, its last row is used; no weight decay on norms and biases; the learning rate drops at 60 % and 80 % of
any run instead of epochs 120 and 160 of 200. Like the reference, it omits the paper's proximal term.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_probability, require
from lightning_contrast.augment import ViewPolicy, ViewSpec, make_policy
from lightning_contrast.augment.view_spec import ViewOptions
from lightning_contrast.callbacks import QueueUpdate
from lightning_contrast.contracts import require_indices
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses import info_nce, noise_contrastive_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import MemoryBank, build_head
from lightning_contrast.nn.temperature import Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike, step_decay
from lightning_contrast.precision import full_precision, unit_rows
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.runtime.temperature import current_temperature


class NPID(SelfSupervisedModule):
    """Discriminate every training image from all others with a memory bank.

    A batch holds one view (B, C, h, w) and the sample indices (B,); `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        num_samples: Number N of training images: indices lie in [0, N).
        projection_dim: D, the width of the projection, one linear layer, also of a custom ``projector``.
        projector: A module (B, F) -> (B, D) that replaces that layer.
        num_negatives: Number of random negatives per image in noise-contrastive estimation; 0: a softmax over all
            images, as in the reference implementation for CIFAR-10.
        temperature: Divisor of the similarities, > 0; the reference has 0.07 on ImageNet and 0.1 on CIFAR-10. With
            ``num_negatives=0`` also `nn.LearnedTemperature`, `nn.ScheduledTemperature`, or a function of the step.
        momentum: EMA momentum of the rows of the memory bank, in [0, 1].
        optimizer: "sgd" as in the reference implementation, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the reference's 0.03 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up; the reference has none.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.03
    normalizer_bits: Tensor

    def __init__(
        self,
        backbone: str | nn.Module,
        num_samples: int,
        *,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        num_negatives: int = 4096,
        temperature: Temperature = 0.07,
        momentum: float = 0.5,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_at_least("num_samples", num_samples, 2)
        check_at_least("num_negatives", num_negatives, 0)
        check_probability("momentum", momentum)
        self.num_negatives, self.temperature = num_negatives, check_temperature(temperature)
        valid = isinstance(temperature, int | float) or num_negatives == 0
        hint = "Set `num_negatives=0`: Z of the noise-contrastive estimate is computed once"
        require(valid, "temperature", "be a number with `num_negatives`", type(temperature).__name__, hint)
        self.projector = projector or build_head("moco", self.feature_dim, out_dim=projection_dim, layers=1)
        self.bank = MemoryBank(num_samples, projection_dim, momentum)
        # Z of the paper, computed once from the first batch; 0 until then. Kept as an integer of equal bits, since
        # strategies cast floating buffers.
        self.register_buffer("normalizer_bits", torch.zeros(1, dtype=torch.int32))
        self.save_hyperparameters()

    @staticmethod
    def views(
        size: int,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Unpack[ViewOptions],
    ) -> ViewPolicy:
        """Return the published policy, one view of `moco_v1_views`."""
        view = ViewSpec(size, (0.2, 1.0), (0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_first=True)
        return make_policy([view], mean=mean, std=std, **options)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of one view, features (B, F), and projections (B, D) for the bank."""
        (view,) = self.batch_views(batch, count=1)
        indices = require_indices(batch, "NPID")  # (B,)
        if batch_idx == 0 or indices.device.type == "cpu":  # synchronizes with the device
            self.bank.check_indices(indices)
        features = self.backbone(view)  # (B, F)
        projection = unit_rows(self.projector(features))  # (B, D)
        loss = self._noise_loss(projection, indices) if self.num_negatives else self._softmax_loss(projection, indices)
        self.log("train/loss", loss, batch_size=len(view))
        # QueueUpdate writes "keys" to the rows "indices" of the bank after the batch.
        return {"loss": loss, "features": features.detach(), "keys": projection.detach(), "indices": indices}

    @property
    def normalizer(self) -> Tensor:
        """Z of the paper, (1,) float32, a view of the buffer; 0 before the first batch."""
        return self.normalizer_bits.view(torch.float32)

    def queues(self) -> dict[str, nn.Module]:
        """Return the memory bank."""
        return {"keys": self.bank}

    def default_callbacks(self) -> list[L.Callback]:
        """Return the callback that updates the bank."""
        return [QueueUpdate()]

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up, then divided by 10 at 60 % and at 80 % of the run."""
        if step < warmup_steps:
            return super().lr_factor(step, warmup_steps, total_steps)
        return step_decay(step, (round(0.6 * total_steps), round(0.8 * total_steps)))

    def _softmax_loss(self, projection: Tensor, indices: Tensor) -> Tensor:
        """Return the cross-entropy of projections (B, D) over all N images."""
        bank = self.bank.features  # (N, D)
        rows = torch.arange(len(bank), device=bank.device)
        return info_nce(
            projection,
            bank[indices].to(projection.dtype),
            bank,
            temperature=current_temperature(self),
            groups=indices,
            negatives_groups=rows,
        )

    def _noise_loss(self, projection: Tensor, indices: Tensor) -> Tensor:
        """Return the noise-contrastive estimate of projections (B, D) with random negatives."""
        drawn = torch.randint(len(self.bank.features), (len(indices), self.num_negatives), device=indices.device)
        rows = self.bank.features[torch.cat([indices[:, None], drawn], dim=1)]  # (B, 1 + K, D)
        odds = unnormalized_odds(projection, rows, current_temperature(self))  # (B, 1 + K)
        with torch.no_grad():
            size = len(self.bank.features)
            first = size * global_mean(odds.mean(1))
            self.normalizer.copy_(torch.where(self.normalizer > 0, self.normalizer, first))
        return noise_contrastive_loss(odds / self.normalizer.to(odds.dtype), size)


@full_precision
def unnormalized_odds(projection: Tensor, rows: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``exp(cos / temperature)``, (B, 1 + K), of projections (B, D) with rows (B, 1 + K, D)."""
    rows = F.normalize(rows.to(projection.dtype), dim=2)
    return ((rows @ projection.unsqueeze(2)).squeeze(2) / temperature).exp()
