"""Protocols on scores and predictions: out-of-distribution scores, conformal sets, the worst group."""

from typing import Literal

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.evaluation.measures.conformal import conformal_sets, conformal_threshold
from lightning_contrast.evaluation.protocols.inputs import held_out, labeled
from lightning_contrast.metrics.neighbours import check_features, nearest_neighbours

OODMethod = Literal["knn", "mahalanobis", "relative_mahalanobis"]


def ood_scores(
    train: Tensor,
    test: Tensor,
    *,
    method: OODMethod = "knn",
    train_labels: Tensor | None = None,
    k: int = 50,
) -> Tensor:
    """Score how much features are like those of the training set; `ood_metrics` judges the scores.

    "knn" is minus the squared distance to the k-th nearest L2-normalized training feature
    (https://arxiv.org/abs/2204.06507; k = 50 for CIFAR, 1,000 for ImageNet), and needs no labels. "mahalanobis" is
    minus the squared Mahalanobis distance to the nearest class mean under one covariance
    (https://arxiv.org/abs/1807.03888); "relative_mahalanobis" subtracts that to the mean of all under their covariance
    (https://arxiv.org/abs/2106.09022).

    Args:
        train: Features ``(N, F)``, floating.
        test: Features ``(M, F)``.
        method: "knn", "mahalanobis" or "relative_mahalanobis".
        train_labels: Classes ``(N,)``, for the last two; -1 for unlabeled rows, which are left out.
        k: Neighbor whose distance counts, 1 to N.

    Returns:
        ``(M,)``, higher for features like those of the training set.

    Raises:
        ValueError: If a name or number is out of range, shapes do not match, or labels are missing.
    """
    check_choice("method", method, ("knn", "mahalanobis", "relative_mahalanobis"))
    check_features("test", test)
    if method == "knn":
        similarities, _ = nearest_neighbours(test, train, k)
        return 2 * similarities[:, -1] - 2  # minus the squared distance of unit vectors
    known = labeled(train, train_labels, "train_labels")
    x, queries = known.features.double(), test.double()
    number = int(known.labels.max()) + 1
    counts = torch.bincount(known.labels, minlength=number)
    means = torch.zeros(number, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, known.labels, x)
    means = means / counts.clamp(min=1).unsqueeze(1)
    present = counts > 0
    scores = -_squared(queries, means[present], x - means[known.labels]).amin(1)
    if method == "relative_mahalanobis":
        center = x.mean(0, keepdim=True)
        scores = scores + _squared(queries, center, x - center)[:, 0]
    return scores


def _squared(queries: Tensor, means: Tensor, centered: Tensor) -> Tensor:
    """Return squared Mahalanobis distances ``(M, K)`` under the covariance of centered rows ``(N, F)``."""
    precision = torch.linalg.pinv(centered.T @ centered / len(centered), hermitian=True)
    parts = [queries - mean for mean in means]
    return torch.stack([((part @ precision) * part).sum(1) for part in parts], 1)


def split_conformal(
    probabilities: Tensor, labels: Tensor, *, alpha: float = 0.1, share: float = 0.5, seed: int = 0
) -> dict[str, float]:
    """Calibrate conformal sets (APS) on a part of labeled images, and measure them on the rest.

    Args:
        probabilities: Probabilities ``(N, C)`` of images that were not trained on.
        labels: Classes ``(N,)``, integers in 0..C - 1.
        alpha: Share of images whose set may miss the true class, in (0, 1).
        share: Share of the images of each class that is measured, in (0, 1).
        seed: Seed of the division, >= 0.

    Returns:
        ``coverage``, the share of sets that hold the true class, 1 - alpha at least in expectation; ``size``, the mean
        number of classes per set; and ``threshold``.

    Raises:
        ValueError: If shapes do not match or a number is out of range.
    """
    rest, measured = held_out(labels, share, seed)
    threshold = conformal_threshold(probabilities[rest], labels[rest], alpha=alpha, guarantee=True)
    sets = conformal_sets(probabilities[measured], threshold, extra=0)
    hits = [label in found for label, found in zip(labels[measured].tolist(), sets, strict=True)]
    return {
        "coverage": sum(hits) / len(hits),
        "size": sum(map(len, sets)) / len(sets),
        "threshold": threshold,
    }


def worst_group_accuracy(correct: Tensor, groups: Tensor, *, least: int = 1) -> dict[str, float]:
    """Return the accuracy of the group with the lowest one (https://arxiv.org/abs/1911.08731).

    Args:
        correct: Whether each prediction is right, ``(N,)`` bool.
        groups: Group of each image, ``(N,)`` integers.
        least: Images that a group needs to count, >= 1.

    Returns:
        ``accuracy`` of the worst group, in 0..1; ``group``, its number; ``images`` in it; ``mean``, the accuracy of
        all images.

    Raises:
        ValueError: If shapes do not match or no group is large enough.
    """
    check_at_least("least", least, 1)
    fits = correct.shape == groups.shape and correct.ndim == 1 and not groups.is_floating_point()
    got = (tuple(correct.shape), tuple(groups.shape))
    require(fits, "groups", "be integers of the shape (N,) of `correct`", got, "Give one group per image")
    found = []
    for group in groups.unique(sorted=True).tolist():  # type: ignore[no-untyped-call]
        own = correct[groups == group]
        if len(own) >= least:
            found.append((float(own.double().mean()), group, len(own)))
    if not found:
        fail("least", "be at most the size of the largest group", least, "Decrease it")
    worst, group, images = min(found)
    return {"accuracy": worst, "group": group, "images": images, "mean": float(correct.double().mean())}
