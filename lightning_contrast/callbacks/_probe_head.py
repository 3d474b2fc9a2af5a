"""The linear classifier of the online probe: its weights, its statistics and its step, the same on every rank."""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast.distributed import all_reduce_sum

STATISTICS_MOMENTUM = 0.02
"""Share of a batch in the running statistics, once more than 1 / 0.02 = 50 batches were seen."""
CLIP = 10.0
"""Standardised features are cut there, so that a jump of the backbone cannot throw the classifier away."""


T = TypeVar("T")


class LinearHead(nn.Module):
    """Softmax regression on features that are standardised by running statistics.

    It starts at zero: the usual start of a convex problem, and one that draws no random number.

    Args:
        width: F.
        num_classes: C.
        device: Where the features are.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, width: int, num_classes: int, device: torch.device) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.weight = nn.Parameter(torch.zeros(num_classes, width, **options))
        self.bias = nn.Parameter(torch.zeros(num_classes, **options))
        self.register_buffer("mean", torch.zeros(width, **options))
        self.register_buffer("var", torch.ones(width, **options))
        self.batches = 0

    @property
    def width(self) -> int:
        """The number of features, F."""
        return self.weight.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, C) of features (B, F)."""
        standardised = (features - self.mean) * self._scale()
        return F.linear(standardised.clamp(-CLIP, CLIP), self.weight, self.bias)

    def gradient(self, features: Tensor, labels: Tensor, valid: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Set ``.grad`` to the gradient of the mean loss over the valid images of all ranks, and follow the features.

        One all-reduce carries the gradients, the loss and the sums for the statistics, which move afterwards: a step
        sees the statistics of the steps before it, which are equal on all ranks.

        Args:
            features: (B, F), float32, finite.
            labels: (B,), int64.
            valid: (B,), False where an image does not count.
            finite: (B,), False where the features are not the image's own and do not count in the statistics.

        Returns:
            The logits (B, C) and the mean loss over all ranks, in nats; both detached.
        """
        counts = finite.to(features.dtype)
        if self.batches == 0:
            self._start(features, counts)
        scale = self._scale()
        standardised = (features - self.mean) * scale
        with torch.enable_grad():
            logits = F.linear(standardised.clamp(-CLIP, CLIP), self.weight, self.bias)
            loss = (F.cross_entropy(logits, labels, reduction="none") * valid).sum()
            grads = torch.autograd.grad(loss, (self.weight, self.bias))
        kept = standardised * counts.unsqueeze(1)
        sums = (*grads, loss.detach(), valid.sum(), counts.sum(), kept.sum(dim=0), (kept * standardised).sum(dim=0))
        flat = all_reduce_sum(torch.cat([part.reshape(-1) for part in sums]))
        weight, bias, loss, labelled, seen, first, second = torch.split(flat, [part.numel() for part in sums])
        labelled = labelled.clamp(min=1.0)
        self.weight.grad, self.bias.grad = weight.view_as(self.weight) / labelled, bias / labelled
        self._follow(first / seen.clamp(min=1.0), second / seen.clamp(min=1.0), scale, seen > 0)
        return logits.detach(), (loss / labelled).squeeze(0)

    def _scale(self) -> Tensor:
        """Return 1 / std; constant features are worth nothing, not a division by their rounding errors."""
        floor = 1e-12 * self.var.mean() + 1e-10 * self.mean.square() + 1e-30
        return self.var.maximum(floor).rsqrt()

    def _start(self, features: Tensor, counts: Tensor) -> None:
        """Take the statistics of the first batch, in two passes, since nothing is known of their size yet."""
        counts = counts.unsqueeze(1)
        sums = all_reduce_sum(torch.cat([(features * counts).sum(dim=0), counts.sum().view(1)]))
        total = sums[-1].clamp(min=1.0)
        self.mean.copy_(sums[:-1] / total)
        self.var.copy_(all_reduce_sum(((features - self.mean).square() * counts).sum(dim=0)) / total)

    def _follow(self, first: Tensor, second: Tensor, scale: Tensor, any_seen: Tensor) -> None:
        """Move the statistics by the mean and the mean square of a batch's standardised features."""
        self.batches += 1
        share = max(1 / self.batches, STATISTICS_MOMENTUM) * any_seen
        shift = first / scale
        batch_var = (second - first.square()).clamp(min=0.0) / scale.square()
        self.var.add_(share * (batch_var + (1 - share) * shift.square() - self.var))
        self.mean.add_(share * shift)


def default_lr(batch: int, width: int) -> float:
    """Return the learning rate of SGD with momentum 0.9 that needs no tuning.

    Args:
        batch: Images of a step on all ranks, B: more images, less noise, longer steps.
        width: F: the curvature of the loss grows with it.
    """
    return min(0.1, min(math.sqrt(batch), 16.0) / width)


def to_cpu(value: T) -> T:
    """Copy nested dicts and lists, with their tensors on the CPU."""
    copied: Any = value
    if isinstance(value, Tensor):
        copied = value.detach().cpu().clone()
    elif isinstance(value, dict):
        copied = {key: to_cpu(item) for key, item in value.items()}
    elif isinstance(value, list):
        copied = [to_cpu(item) for item in value]
    return copied  # type: ignore[no-any-return]  # of the type that it copies
