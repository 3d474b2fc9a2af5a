"""Accuracy per group, its worst group and gap, with Wilson intervals."""

from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_contrast._checks import check_at_least, check_interval, fail, require


def wilson_interval(correct: Tensor, total: Tensor, *, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """Compute the Wilson score interval of shares, which holds for small numbers and for shares near 0 and 1.

    Source: Wilson 1927 (https://doi.org/10.1080/01621459.1927.10502953), without continuity correction.

    Args:
        correct: Number of correct answers, of any shape ``(...)``, in 0 .. ``total``.
        total: Number of answers, ``(...)``, >= 0.
        confidence: Probability of the interval, in (0, 1).

    Returns:
        The lower and the upper end, ``(...)`` float64, in [0, 1]; 0 and 1 without any answer.

    Raises:
        ValueError: If the shapes differ or ``confidence`` is out of range.

    Example:
        >>> low, high = wilson_interval(torch.tensor([8]), torch.tensor([10]))
        >>> round(low.item(), 3), round(high.item(), 3)
        (0.49, 0.943)
    """
    shapes = tuple(correct.shape), tuple(total.shape)
    require(correct.shape == total.shape, "correct", "have the shape of `total`", shapes, "Give both per group")
    check_interval("confidence", confidence, "(0, 1)", "Usual is 0.95")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    n, known = total.double().clamp(min=1), total > 0
    p = correct.double() / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)).sqrt()
    low, high = (middle - half).clamp(min=0), (middle + half).clamp(max=1)
    return torch.where(known, low, 0.0), torch.where(known, high, 1.0)


class GroupAccuracy(Metric):
    """Accuracy of each group of images, that of the worst one, and the gap between the best and the worst.

    Groups are usually the values of a protected attribute, or its pairs with the classes, such as
    ``classes * attributes + attribute``. The gap of such pairs within a class is the difference of true positive rates,
    which equalized odds compare. A gap below the half-widths of the intervals of its two groups is noise.

    Args:
        num_groups: Number of groups G, >= 1.
        confidence: Probability of the Wilson intervals, in (0, 1).
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        TypeError: If ``num_groups`` is not a whole number.
        ValueError: If a number is out of range.

    Example:
        >>> metric = GroupAccuracy(num_groups=2)
        >>> metric.update(torch.tensor([1, 0, 1, 1]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
        >>> result = metric.compute()
        >>> result["accuracy"].item(), result["worst"].item(), result["gap"].item(), result["groups"].tolist()
        (0.75, 0.5, 0.5, [1.0, 0.5])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    total: Tensor

    def __init__(self, num_groups: int, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least("num_groups", num_groups, 1)
        check_interval("confidence", confidence, "(0, 1)", "Usual is 0.95")
        self.num_groups, self.confidence = num_groups, confidence
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(num_groups, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor, groups: Tensor) -> None:
        """Count the answers of a batch.

        Args:
            predictions: Predicted classes, ``(B,)`` integers.
            labels: True classes, ``(B,)`` integers.
            groups: Groups, ``(B,)`` integers in 0 .. G - 1; images with one below 0 are left out.

        Raises:
            ValueError: If shapes do not match, or a group is not below G.
            TypeError: If one of them is not an integer tensor.
        """
        for name, values in (("predictions", predictions), ("labels", labels), ("groups", groups)):
            if values.is_floating_point():
                fail(name, "be an integer tensor", values.dtype, "Pass one class or group per image", TypeError)
            shape = tuple(values.shape)
            require(values.shape == (len(labels),), name, f"have shape ({len(labels)},)", shape, "Pass one per image")
        largest = int(groups.max()) if len(groups) else 0
        hint = "Give the number of groups to GroupAccuracy"
        require(largest < self.num_groups, "groups", f"be below {self.num_groups}", largest, hint)
        known, places = groups >= 0, groups.long().clamp(min=0)
        self.correct.index_add_(0, places, ((predictions == labels) & known).long())
        self.total.index_add_(0, places, known.long())

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies over all batches and ranks.

        Returns:
            "accuracy", over all images; "worst" and "gap" of the groups that have images, scalars; "groups", "low" and
            "high", the accuracy of each group and its interval, ``(G,)``; "images", their number, ``(G,)``. All in 0..1
            and float64 but the last; NaN without images.
        """
        known = self.total > 0
        groups = self.correct.double() / self.total
        low, high = wilson_interval(self.correct, self.total, confidence=self.confidence)
        worst = groups.where(known, torch.inf).amin()
        best = groups.where(known, -torch.inf).amax()
        nothing = torch.full_like(worst, torch.nan)
        return {
            "accuracy": self.correct.sum().double() / self.total.sum(),
            "worst": torch.where(known.any(), worst, nothing),
            "gap": torch.where(known.any(), best - worst, nothing),
            "groups": groups,
            "low": low,
            "high": high,
            "images": self.total.clone(),
        }
