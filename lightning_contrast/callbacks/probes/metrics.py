"""Validation metrics of the online probes, built on torchmetrics."""

import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric, R2Score
from torchmetrics.classification import (
    MulticlassCalibrationError,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)


class MaskedAccuracy(Metric):
    """Share of correct predictions among the valid images of all batches and ranks.

    Unlike `torchmetrics.MeanMetric` it does not synchronize with the device, and its counts are exact integers.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")  # correct, valid

    def update(self, correct: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            correct: Whether the prediction is correct, ``(B,)``, bool.
            valid: Whether the image counts, ``(B,)``, bool.
        """
        self.counts += torch.stack([correct & valid, valid]).sum(dim=1)

    def compute(self) -> Tensor:
        """Return the share, a scalar in 0..1, NaN without valid images."""
        return self.counts[0] / self.counts[1]


CALIBRATION_BINS = 15
"""As in https://arxiv.org/abs/1706.04599."""


class Scores(ABC):
    """Metrics of a probe's outputs over all batches of a loader and all ranks."""

    @abstractmethod
    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: Predictions of the probe, ``(B, ...)``.
            targets: Targets of the task, ``(B, ...)``.
            valid: Whether the image counts, ``(B,)``, bool.
        """

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Return scalars by name; a collective operation, to be called on every rank."""


class MeanLoss(Metric):
    """Weighted mean of a loss over all batches and ranks."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2), dist_reduce_fx="sum")  # loss, weight

    def update(self, loss: Tensor, weights: Tensor) -> None:
        """Add a batch.

        Args:
            loss: Sum over the images, a scalar.
            weights: Weight of each image in the mean, ``(B,)``.
        """
        self.sums += torch.stack([loss.float(), weights.float().sum()])

    def compute(self) -> Tensor:
        """Return the mean, a scalar, NaN without images."""
        return self.sums[0] / self.sums[1]


class ClassScores(Scores):
    """Top-1 and top-5 accuracy and the expected calibration error (15 bins, L1).

    Top-5 is left out for fewer than five classes. The calibration error stores two numbers per image.

    Args:
        num_classes: Number of classes C.
        device: Device of the logits ``(B, C)``.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.ranks = (1, 5) if num_classes >= 5 else (1,)
        self.accuracies = [MaskedAccuracy().to(device) for _ in self.ranks]
        self.calibration = MulticlassCalibrationError(num_classes, CALIBRATION_BINS, validate_args=False).to(device)

    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add logits ``(B, C)``, classes ``(B,)`` and the mask ``(B,)``."""
        best = outputs.topk(self.ranks[-1], dim=1).indices if len(self.ranks) > 1 else outputs.argmax(1, keepdim=True)
        correct = best == targets.unsqueeze(1)
        for k, accuracy in zip(self.ranks, self.accuracies, strict=True):
            accuracy.update(correct[:, :k].any(dim=1), valid)
        self.calibration.update(torch.softmax(outputs[valid].float(), dim=1), targets[valid])

    def compute(self) -> dict[str, Tensor]:
        """Return ``top1``, ``top5`` and ``calibration_error``, scalars."""
        found = {f"top{k}": accuracy.compute() for k, accuracy in zip(self.ranks, self.accuracies, strict=True)}
        return found | {"calibration_error": self.calibration.compute()}


class MultilabelScores(Scores):
    """Mean average precision and mean F1 at a probability of 0.5, over the labels; labels of -1 are ignored.

    The average precision stores the outputs of all images.

    Args:
        num_labels: Number of labels C.
        device: Device of the logits ``(B, C)``.
    """

    def __init__(self, num_labels: int, device: torch.device) -> None:
        self.metrics: dict[str, Metric] = {
            "map": MultilabelAveragePrecision(num_labels, ignore_index=-1, validate_args=False).to(device),
            "f1": MultilabelF1Score(num_labels, ignore_index=-1, validate_args=False).to(device),
        }

    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add logits ``(B, C)``, labels ``(B, C)`` and the mask ``(B,)``."""
        probabilities = torch.sigmoid(outputs[valid].float())
        for metric in self.metrics.values():
            metric.update(probabilities, targets[valid])

    def compute(self) -> dict[str, Tensor]:
        """Return ``map`` and ``f1``, scalars."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Average precision score for one or more classes was `nan`")
            warnings.filterwarnings("ignore", "No positive samples found in target")
            return {name: metric.compute() for name, metric in self.metrics.items()}


class RegressionScores(Scores):
    """R2, averaged over the targets, and the mean absolute error in the unit of the targets.

    Args:
        device: Device of the predictions ``(B, C)``.
    """

    def __init__(self, device: torch.device) -> None:
        self.r2, self.mae = R2Score().to(device), MeanAbsoluteError().to(device)

    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add predictions ``(B, C)``, targets ``(B, C)`` and the mask ``(B,)``."""
        for metric in (self.r2, self.mae):
            metric.update(outputs[valid].float().squeeze(1), targets[valid].squeeze(1))

    def compute(self) -> dict[str, Tensor]:
        """Return ``r2``, NaN for fewer than two images, and ``mae``, scalars."""
        try:
            r2 = self.r2.compute()
        except ValueError:  # fewer than two images
            r2 = self.mae.sum_abs_error.new_tensor(float("nan"))
        return {"r2": r2, "mae": self.mae.compute()}
