"""Calibration: whether predictions with a confidence of p are right in a share p of the cases."""

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, require


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> Tensor:
    """Compute the expected calibration error (ECE) of class predictions.

    Source: https://arxiv.org/abs/1706.04599, Eq. 3: the mean over equally wide bins of the confidence, weighted by
    their number of predictions, of the gap between accuracy and mean confidence. Bins are ``(low, high]``, as in the
    authors' code; torchmetrics gives confidences of exactly 1 a bin of their own. Biased upward for few predictions.

    Args:
        logits: Logits ``(N, C)``, before the softmax.
        labels: Classes ``(N,)``, integers in 0..C - 1.
        bins: Number of bins, >= 1.

    Returns:
        A float64 scalar in 0..1.

    Raises:
        ValueError: If shapes do not match, a label is out of range, or there are no rows.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [9.0, 0.0]])  # sure of class 0, right half of the time
        >>> round(calibration_error(logits, torch.tensor([0, 1])).item(), 2)
        0.5
    """
    check_predictions("logits", logits, labels)
    check_at_least("bins", bins, 1)
    confidences, predictions = logits.double().softmax(1).max(1)
    correct = (predictions == labels).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
    place = (torch.bucketize(confidences, edges) - 1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, place, correct - confidences)
    return gaps.abs().sum() / len(labels)


def rms_calibration_error(
    confidences: Tensor, correct: Tensor, *, bin_size: int = 100, omit_last_bin: bool = False
) -> Tensor:
    """Compute the root-mean-square calibration error over bins with equal numbers of predictions.

    Source: https://arxiv.org/abs/1812.04606, section 4.3, and the code of https://arxiv.org/abs/1907.07174.
    Differs from that code: it leaves the bin with the largest confidences out of the sum, which ``omit_last_bin=True``
    repeats.

    Args:
        confidences: Confidence of each prediction, ``(N,)``, in 0..1.
        correct: Whether each prediction is right, ``(N,)``, bool or 0 and 1.
        bin_size: Predictions per bin, >= 1; the last bin has up to twice as many.
        omit_last_bin: Leave out the bin with the largest confidences.

    Returns:
        A float64 scalar in 0..1.

    Raises:
        ValueError: If the shapes differ or there are no predictions.
    """
    check_at_least("bin_size", bin_size, 1)
    confidences, correct = _sorted(confidences, correct)
    number = max(1, len(confidences) // bin_size)
    place = (torch.arange(len(confidences), device=confidences.device) // bin_size).clamp(max=number - 1)
    sums = confidences.new_zeros(2, number).index_add_(1, place, torch.stack([correct - confidences, correct * 0 + 1]))
    squares = sums[0].square() / sums[1] / len(confidences)  # share of the bin, times its squared mean gap
    return (squares[:-1] if omit_last_bin else squares).sum().sqrt()


def aurra(confidences: Tensor, correct: Tensor) -> Tensor:
    """Compute the area under the response rate accuracy curve.

    Source: the code of https://arxiv.org/abs/1907.07174: the mean, over n = 1..N, of the accuracy of the n predictions
    with the largest confidences. Of equal confidences the first counts as the larger.

    Args:
        confidences: Confidence of each prediction, ``(N,)``.
        correct: Whether each prediction is right, ``(N,)``, bool or 0 and 1.

    Returns:
        A float64 scalar in 0..1.

    Raises:
        ValueError: If the shapes differ or there are no predictions.
    """
    _, correct = _sorted(confidences, correct, descending=True)
    ranks = torch.arange(1, len(correct) + 1, device=correct.device)
    return (correct.cumsum(0) / ranks).mean()


def check_predictions(name: str, scores: Tensor, labels: Tensor) -> None:
    """Check scores ``(N, C)`` of classes, and labels ``(N,)`` in 0..C - 1, N >= 1.

    Args:
        name: Name of the scores, for the message.
        scores: The scores.
        labels: The labels.

    Raises:
        ValueError: If they do not fit.
    """
    floating = scores.ndim == 2 and scores.is_floating_point() and len(scores) > 0
    got = f"{tuple(scores.shape)} {scores.dtype}"
    require(floating, name, "be floating (N, C), N >= 1", got, "Give one row of scores per image")
    whole = labels.shape == scores.shape[:1] and not labels.is_floating_point()
    got = f"{tuple(labels.shape)} {labels.dtype}"
    require(whole, "labels", f"be integers of shape ({len(scores)},)", got, "Give one class per row of scores")
    low, high = (int(bound) for bound in torch.aminmax(labels))
    classes = scores.shape[1]
    require(low >= 0 and high < classes, "labels", f"lie in 0..{classes - 1}", (low, high), "Leave unlabeled rows out")


def _sorted(confidences: Tensor, correct: Tensor, *, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Return both ``(N,)`` in float64, in the order of the confidences."""
    same = confidences.shape == correct.shape and confidences.ndim == 1 and len(confidences) > 0
    got = (tuple(confidences.shape), tuple(correct.shape))
    require(same, "correct", "have the shape (N,) of `confidences`, N >= 1", got, "Give one entry per prediction")
    values, order = confidences.double().sort(stable=True, descending=descending)
    return values, correct.to(values.dtype)[order]
