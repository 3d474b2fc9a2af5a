"""Split-conformal prediction sets: sets of classes that hold the true one with a chosen probability."""

import math

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, check_interval, check_not_negative
from lightning_contrast.evaluation.measures.calibration import check_predictions


def conformal_threshold(
    probabilities: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    kreg: int = 0,
    penalty: float = 0.0,
    guarantee: bool = False,
) -> float:
    """Return the threshold of `conformal_sets` from calibration images.

    The score of an image is the sum of the probabilities of the classes that are at least as likely as the true one
    (APS, https://arxiv.org/abs/2006.02544; RAPS, https://arxiv.org/abs/2009.14193). The default follows the reference
    implementation of RAPS without randomization: the plain 1 - alpha quantile of the scores, to which only the penalty
    of the most likely class is added, so that with penalties the sets cover less than 1 - alpha.
    ``guarantee=True`` is the papers' formula, whose sets hold the true class with a probability of at least 1 - alpha:
    all penalties are part of the scores, and the quantile is that of rank ``ceil((N + 1)(1 - alpha))``.

    Args:
        probabilities: Probabilities ``(N, C)`` of images that were not trained on.
        labels: Classes ``(N,)``, integers in 0..C - 1.
        alpha: Share of images whose set may miss the true class, in (0, 1).
        kreg: Number of most likely classes without a penalty, >= 0.
        penalty: Added per class beyond them, >= 0; 0 is APS.
        guarantee: Use the papers' formula.

    Returns:
        The threshold; infinite if there are too few images to guarantee 1 - alpha.

    Raises:
        ValueError: If shapes do not match or a value is out of range.
    """
    check_predictions("probabilities", probabilities, labels)
    check_interval("alpha", alpha, "(0, 1)", "0.1 is for sets that cover 90 %")
    cumulated, order = _cumulated(probabilities)
    ranks = (order == labels.unsqueeze(1)).double().argmax(1)  # 0 for the most likely class
    scores = cumulated.gather(1, ranks.unsqueeze(1)).squeeze(1)
    penalties = _penalties(probabilities, kreg, penalty)
    scores = (scores + (penalties[ranks] if guarantee else penalties[0])).sort().values
    number = len(scores)
    if guarantee:
        rank = math.ceil((number + 1) * (1 - alpha) - 1e-9)
        return float(scores[rank - 1]) if rank <= number else math.inf
    return float(scores[math.ceil((number - 1) * (1 - alpha) - 1e-9)])


def conformal_sets(
    probabilities: Tensor, threshold: float, *, kreg: int = 0, penalty: float = 0.0, extra: int = 1
) -> list[list[int]]:
    """Return the conformal prediction set of each image.

    As the reference implementation of RAPS (https://arxiv.org/abs/2009.14193) without randomization: the most likely
    classes whose cumulated probability and penalty stay at or below the threshold, and one more. ``extra=0`` leaves
    that one out: the smallest sets for which a threshold with ``guarantee=True`` holds.

    Args:
        probabilities: Probabilities ``(N, C)``.
        threshold: Threshold of `conformal_threshold`.
        kreg: Number of most likely classes without a penalty, >= 0.
        penalty: Added per class beyond them, >= 0; 0 is APS.
        extra: Classes beyond the threshold, 0 or 1; a set has at least one class.

    Returns:
        N lists of classes, most likely first, each with at least one.

    Raises:
        ValueError: If the shape or a value is out of range.

    Example:
        >>> conformal_sets(torch.tensor([[0.7, 0.2, 0.1]]), 0.8)
        [[0, 1]]
    """
    rows = torch.zeros(len(probabilities), dtype=torch.int64, device=probabilities.device)
    check_predictions("probabilities", probabilities, rows)
    cumulated, order = _cumulated(probabilities)
    within = cumulated + _penalties(probabilities, kreg, penalty) <= threshold
    check_choice("extra", extra, (0, 1))
    sizes = (within.sum(1) + extra).clamp(1, probabilities.shape[1])
    return [row[:size] for row, size in zip(order.tolist(), sizes.tolist(), strict=True)]


def _cumulated(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return cumulated probabilities in float64 and the classes, most likely first, ``(N, C)`` each."""
    values, order = probabilities.double().sort(dim=1, descending=True, stable=True)
    return values.cumsum(1), order


def _penalties(probabilities: Tensor, kreg: int, penalty: float) -> Tensor:
    """Return the sum of the penalties up to each rank, ``(C,)``."""
    check_at_least("kreg", kreg, 0)
    check_not_negative("penalty", penalty)
    ranks = torch.arange(probabilities.shape[1], dtype=torch.float64, device=probabilities.device)
    return penalty * (ranks + 1 - kreg).clamp(min=0)
