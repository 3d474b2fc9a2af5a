"""NPID: every training image is a class of its own, and a running average of its features is the classifier.

Paper: https://arxiv.org/abs/1805.01978.
Reference program: zhirongw/lemniscate.pytorch.
Differs from it: bank rows are brought to unit length before use, which they have anyway once they were written; where
an image occurs twice in a batch its last row counts; norms and biases carry no weight decay; the rate falls at 60 % and
80 % of any run, not at epochs 120 and 160 of 200. The paper's proximal term is left out, as in the program.
"""

from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_probability, require
from lightning_contrast.callbacks import QueueUpdate
from lightning_contrast.contracts import require_indices
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses import info_nce
from lightning_contrast.methods.base import SelfSupervisedModule, temperature_of
from lightning_contrast.nn import MemoryBank, moco_head
from lightning_contrast.nn.temperature import Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike, step_decay
from lightning_contrast.precision import full_precision, unit_rows

_EPSILON = 1e-7  # of the program


class NPID(SelfSupervisedModule):
    """Tell every training image from all others by a memory bank.

    A batch holds one view (B, C, h, w) and the sample indices (B,); `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        num_samples: Number N of training images: indices lie in [0, N).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        projection_dim: D, the width of the projection, one linear layer, also of a ``projector`` of your own.
        projector: A module (B, F) -> (B, D) in the place of that layer.
        noise: Random images that each image is told from by noise-contrastive estimation; 0: from all others by a
            softmax, as the program has it on CIFAR-10.
        temperature: Divisor of the similarities, > 0; the program has 0.07 on ImageNet and 0.1 on CIFAR-10. With
            ``noise=0`` also `nn.LearnedTemperature`, `nn.ScheduledTemperature`, or a function of the optimizer step.
        momentum: Share of a bank row that is kept when its image was seen, in [0, 1].
        optimizer: "sgd" as in the program, "adamw", "lars", "lamb", or a callable.
        lr: Learning rate, absolute; None is the program's 0.03 x global batch / 256.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up; the program has none.
    """

    base_lr: ClassVar[float] = 0.03
    normalizer_bits: Tensor

    def __init__(
        self,
        backbone: str | nn.Module,
        num_samples: int,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        noise: int = 4096,
        temperature: Temperature = 0.07,
        momentum: float = 0.5,
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
        check_at_least("num_samples", num_samples, 2)
        check_at_least("noise", noise, 0)
        check_probability("momentum", momentum)
        self.noise, self.temperature = noise, check_temperature(temperature)
        fixed, hint = isinstance(temperature, int | float), "Set `noise=0`: Z of the noise estimate is taken once"
        require(fixed or noise == 0, "temperature", "be a number with `noise`", type(temperature).__name__, hint)
        self.projector = projector or moco_head(self.feature_dim, None, projection_dim, layers=1)
        self.bank = MemoryBank(num_samples, projection_dim, momentum)
        # Z of the paper, taken once from the first batch; 0 until then.
        # As the integer of equal bits: strategies cast floating buffers.
        self.register_buffer("normalizer_bits", torch.zeros(1, dtype=torch.int32))
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of a batch of one view with indices, and the projections for the bank."""
        (view,) = self.views(batch, count=1)
        indices = require_indices(batch, "NPID")  # (B,)
        if batch_idx == 0 or indices.device.type == "cpu":  # it waits for the device
            self.bank.check_indices(indices)
        features = self.backbone(view)  # (B, F)
        projection = unit_rows(self.projector(features))  # (B, D)
        loss = self._noise_loss(projection, indices) if self.noise else self._softmax_loss(projection, indices)
        self.log("train/loss", loss, batch_size=len(view))
        return {"loss": loss, "features": features.detach(), "keys": projection.detach(), "indices": indices}

    @property
    def normalizer(self) -> Tensor:
        """Z of the paper, (1,) float32: the memory that is kept; 0 before the first batch."""
        return self.normalizer_bits.view(torch.float32)

    def queues(self) -> dict[str, nn.Module]:
        """Return the memory bank."""
        return {"keys": self.bank}

    def default_callbacks(self) -> list[L.Callback]:
        """Return what feeds the bank."""
        return [QueueUpdate()]

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the warm-up, then a tenth after 60 % and after 80 % of the run."""
        if step < warmup_steps:
            return super().lr_factor(step, warmup_steps, total_steps)
        return step_decay(step, (round(0.6 * total_steps), round(0.8 * total_steps)))

    def _softmax_loss(self, projection: Tensor, indices: Tensor) -> Tensor:
        """Return the cross entropy of (B, D) over all N images: a softmax whose other classes are the negatives."""
        bank = self.bank.features  # (N, D)
        rows = torch.arange(len(bank), device=bank.device)
        return info_nce(
            projection,
            bank[indices].to(projection.dtype),
            bank,
            temperature=temperature_of(self),
            groups=indices,
            negatives_groups=rows,
        )

    def _noise_loss(self, projection: Tensor, indices: Tensor) -> Tensor:
        """Return the noise-contrastive estimate of (B, D) with random images."""
        drawn = torch.randint(len(self.bank.features), (len(indices), self.noise), device=indices.device)
        rows = self.bank.features[torch.cat([indices[:, None], drawn], dim=1)]  # (B, 1 + K, D)
        odds = unnormalised_odds(projection, rows, temperature_of(self))  # (B, 1 + K)
        with torch.no_grad():
            size = len(self.bank.features)
            first = size * global_mean(odds.mean(1))
            self.normalizer.copy_(torch.where(self.normalizer > 0, self.normalizer, first))
        return noise_contrastive_loss(odds / self.normalizer.to(odds.dtype), size)


@full_precision
def unnormalised_odds(projection: Tensor, rows: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``exp(cos / temperature)``, (B, 1 + K), of projections (B, D) with rows (B, 1 + K, D)."""
    rows = F.normalize(rows.to(projection.dtype), dim=2)
    return ((rows @ projection.unsqueeze(2)).squeeze(2) / temperature).exp()


@full_precision
def noise_contrastive_loss(probabilities: Tensor, num_samples: int) -> Tensor:
    """Return Eq. 7 of the paper.

    Args:
        probabilities: Of the own image first, then of the K drawn ones, ``(B, 1 + K)``.
        num_samples: Number N of images; each is drawn with probability 1 / N.

    Returns:
        The mean over the images of all ranks, a scalar in nats.
    """
    noise = (probabilities.shape[1] - 1) / num_samples
    own, drawn = probabilities[:, 0], probabilities[:, 1:]
    data_terms = (own / (own + noise + _EPSILON)).log()
    noise_terms = (noise / (drawn + noise + _EPSILON)).log().sum(1)
    return -global_mean(data_terms + noise_terms)
