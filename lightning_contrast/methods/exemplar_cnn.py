"""Exemplar-CNN: every training image is a class, and its random transformations are the examples of the class.

Paper: https://arxiv.org/abs/1406.6909. There is no public implementation.
Differs from it: any backbone; a new transformation at every step instead of a fixed set per image; crops and color
jitter instead of translation, scaling, rotation and powers of HSV; whole images instead of chosen patches; a sampled
softmax for many classes; no weight decay on norms and biases.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_interval
from lightning_contrast.augment import ViewPolicy, ViewSpec, make_policy
from lightning_contrast.augment.view_spec import ViewOptions
from lightning_contrast.contracts import require_indices
from lightning_contrast.distributed import global_mean
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn.memory_bank import check_sample_indices
from lightning_contrast.optim import OptimizerLike, step_decay
from lightning_contrast.precision import full_precision
from lightning_contrast.runtime.method_options import MethodOptions

_LARGEST_SOFTMAX, _DRAWN = 50_000, 8192


class ExemplarCNN(SelfSupervisedModule):
    """Classify each training image as itself, whatever transformation was applied to it.

    A batch holds one view (B, C, h, w) and the sample indices (B,); `forward` gives features (B, F). The classifier has
    a row of weights per image, N x (F + 1) numbers; NPID, its successor without these weights, has N x 128. The loss is
    ln N at equal scores.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        num_samples: Number N of training images: indices lie in [0, N). Beyond about 8,000, classes of images that look
            alike did harm in the paper.
        num_negatives: Number of other classes that are drawn per step, shared by the images of all ranks, for an
            estimate of the softmax; 0: all classes. None: all up to 50,000 classes, else 8,192 drawn ones.
        dropout: Probability of dropping a feature before the classifier, in [0, 1).
        optimizer: "sgd" as in the paper, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is 0.01 x global batch / 256; 0.01 in the paper.
        weight_decay: Weight decay of all parameters except norms and biases; the paper names none.
        warmup_epochs: Epochs of linear warm-up; the paper has none.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.01

    def __init__(
        self,
        backbone: str | nn.Module,
        num_samples: int,
        *,
        num_negatives: int | None = None,
        dropout: float = 0.5,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 0.0,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_at_least("num_samples", num_samples, 2)
        if num_negatives is None:
            num_negatives = 0 if num_samples <= _LARGEST_SOFTMAX else _DRAWN
        check_at_least("num_negatives", num_negatives, 0)
        check_interval("dropout", dropout, "[0, 1)", "The paper has 0.5")
        self.num_samples, self.num_negatives = num_samples, num_negatives
        self.dropout = nn.Dropout(dropout)
        self.classifier = ExemplarClassifier(self.feature_dim, num_samples)
        self.save_hyperparameters()

    @staticmethod
    def views(
        size: int = 32,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Unpack[ViewOptions],
    ) -> ViewPolicy:
        """Return one view: crop 0.4..1, jitter (0.4, 0.4, 0.4, 0.1) at 1, no flip and no grayscale."""
        view = ViewSpec(size, (0.4, 1.0), (0.4, 0.4, 0.4, 0.1), jitter_p=1.0, gray_p=0.0, flip=0.0)
        return make_policy([view], mean=mean, std=std, **options)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the cross-entropy of one view with its own class, and features (B, F)."""
        (view,) = self.batch_views(batch, count=1)
        indices = require_indices(batch, "ExemplarCNN")  # (B,)
        if batch_idx == 0 or indices.device.type == "cpu":  # synchronizes with the device
            check_sample_indices(indices, self.num_samples)
        features = self.backbone(view)  # (B, F)
        drawn = None
        if self.num_negatives:
            drawn = torch.randint(self.num_samples, (self.num_negatives,), device=indices.device)
            drawn = distributed.gather(drawn)[: self.num_negatives]  # those of rank 0
        own, others = self.classifier(self.dropout(features), indices.long(), drawn)  # (B,), (B, K)
        loss = global_mean(torch.cat([own[:, None], others], dim=1).logsumexp(1) - own)
        self.log("train/loss", loss, batch_size=len(view))
        return {"loss": loss, "features": features.detach()}

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up, then divided by 10 at 60 % and at 80 % of the run."""
        if step < warmup_steps:
            return super().lr_factor(step, warmup_steps, total_steps)
        return step_decay(step, (round(0.6 * total_steps), round(0.8 * total_steps)))


class ExemplarClassifier(nn.Linear):
    """A linear layer with one class per training image, in float32.

    Args:
        feature_dim: Width F of the features.
        num_samples: Number N of images.
    """

    @full_precision
    def forward(self, features: Tensor, indices: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the logits of each image's own class and of others.

        Args:
            features: ``(B, F)``.
            indices: The own class of each image, ``(B,)`` int64.
            drawn: Classes drawn uniformly with replacement, ``(K,)``; None for all N.

        Returns:
            Own logits ``(B,)``, and others ``(B, K)``, minus infinity where a drawn class is the own one, plus
            ``ln(N / K)``, so that the sum of their exponentials estimates that of all other classes without bias.
        """
        weight, bias = self.weight.to(features.dtype), self.bias.to(features.dtype)
        if drawn is None:
            logits = F.linear(features, weight, bias)
            own = logits.gather(1, indices[:, None])
            return own.squeeze(1), logits.scatter(1, indices[:, None], -torch.inf)
        own = (features * weight[indices]).sum(1) + bias[indices]
        logits = F.linear(features, weight[drawn], bias[drawn])
        shift = math.log(self.out_features / len(drawn))
        return own, (logits + shift).masked_fill(drawn == indices[:, None], -torch.inf)
