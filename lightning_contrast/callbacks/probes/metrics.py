"""What the online probes log at validation, from torchmetrics."""

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


class Share(Metric):
    """Share of the counted images that were right, over all batches and ranks.

    Differs from `torchmetrics.MeanMetric`: never reads a value on the host, which that does to look for NaN, and which
    without that look (``nan_strategy="disable"``) leaves its weights out of account (torchmetrics 1.9).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    right: Tensor
    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("counted", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, right: Tensor, counted: Tensor) -> None:
        """Add a batch.

        Args:
            right: Whether the prediction was right, ``(B,)``, bool.
            counted: Whether the image counts, ``(B,)``, bool.
        """
        self.right += (right & counted).sum()
        self.counted += counted.sum()

    def compute(self) -> Tensor:
        """Return the share, a scalar in 0..1, NaN where nothing was counted."""
        return self.right / self.counted


CALIBRATION_BINS = 15
"""The usual number (https://arxiv.org/abs/1706.04599)."""


class Scores(ABC):
    """Judges the outputs of a probe over all batches of a loader and all ranks."""

    @abstractmethod
    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: What the probe predicts, (B, ...).
            targets: What is right, (B, ...).
            valid: Whether the image counts, (B,), bool.
        """

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Return scalars by name; every rank must ask."""


class ClassScores(Scores):
    """Top-1 and top-5 accuracy and the expected calibration error (15 bins, L1).

    Top-5 is left out for five classes or fewer. The calibration error keeps two numbers an image.

    Args:
        num_classes: C.
        device: Where the logits (B, C) are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.ranks = (1, 5) if num_classes > 5 else (1,)
        self.shares = [Share().to(device) for _ in self.ranks]
        self.calibration = MulticlassCalibrationError(num_classes, CALIBRATION_BINS, validate_args=False).to(device)

    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add logits (B, C) and classes (B,)."""
        best = outputs.topk(self.ranks[-1], dim=1).indices if len(self.ranks) > 1 else outputs.argmax(1, keepdim=True)
        right = best == targets.unsqueeze(1)
        for k, share in zip(self.ranks, self.shares, strict=True):
            share.update(right[:, :k].any(dim=1), valid)
        self.calibration.update(torch.softmax(outputs[valid].float(), dim=1), targets[valid])

    def compute(self) -> dict[str, Tensor]:
        """Return ``top1``, ``top5`` and ``calibration_error``."""
        found = {f"top{k}": share.compute() for k, share in zip(self.ranks, self.shares, strict=True)}
        return found | {"calibration_error": self.calibration.compute()}


class MultilabelScores(Scores):
    """Mean average precision and mean F1 at a probability of 0.5, over the labels; both leave out what is -1.

    The average precision keeps the outputs of all images.

    Args:
        num_labels: C.
        device: Where the logits (B, C) are.
    """

    def __init__(self, num_labels: int, device: torch.device) -> None:
        self.metrics: dict[str, Metric] = {
            "map": MultilabelAveragePrecision(num_labels, ignore_index=-1, validate_args=False).to(device),
            "f1": MultilabelF1Score(num_labels, ignore_index=-1, validate_args=False).to(device),
        }

    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add logits (B, C) and labels (B, C)."""
        probabilities = torch.sigmoid(outputs[valid].float())
        for metric in self.metrics.values():
            metric.update(probabilities, targets[valid])

    def compute(self) -> dict[str, Tensor]:
        """Return ``map`` and ``f1``."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Average precision score for one or more classes was `nan`")
            warnings.filterwarnings("ignore", "No positive samples found in target")
            return {name: metric.compute() for name, metric in self.metrics.items()}


class RegressionScores(Scores):
    """R2 (the mean over the targets) and the mean absolute error, in the unit of the targets.

    Args:
        device: Where the predictions (B, C) are.
    """

    def __init__(self, device: torch.device) -> None:
        self.r2, self.mae = R2Score().to(device), MeanAbsoluteError().to(device)

    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add predictions (B, C) and targets (B, C)."""
        for metric in (self.r2, self.mae):
            metric.update(outputs[valid].float().squeeze(1), targets[valid].squeeze(1))

    def compute(self) -> dict[str, Tensor]:
        """Return ``r2``, NaN of fewer than two images, and ``mae``."""
        try:
            r2 = self.r2.compute()
        except ValueError:  # torchmetrics' word for fewer than two images
            r2 = self.mae.sum_abs_error.new_tensor(float("nan"))
        return {"r2": r2, "mae": self.mae.compute()}
