"""Few labels: k-shot episodes with intervals, and the accuracy for shares of the labels."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_interval, fail, require
from lightning_contrast.evaluation.protocols.inputs import class_share, labeled, split
from lightning_contrast.evaluation.protocols.logistic import logistic_probe
from lightning_contrast.seeding import derived_seed


def few_shot(
    features: Tensor,
    labels: Tensor,
    *,
    shots: int = 5,
    ways: int | None = 5,
    queries: int = 15,
    episodes: int = 100,
    mean: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Classify queries by the nearest class mean of a few labeled images, in random episodes.

    An episode draws classes, and from each class ``shots`` support images and ``queries`` queries. Features are
    centered at ``mean`` and L2-normalized, as in SimpleShot (https://arxiv.org/abs/1911.04623). Episodes share images,
    so the interval is that of the draw of episodes and not of the images. Two models are compared by the same seed,
    which draws the same episodes.

    Args:
        features: ``(N, F)``, floating.
        labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        shots: Support images per class, >= 1.
        ways: Classes per episode, 2 to the number of classes; None is all classes.
        queries: Queries per class, >= 1.
        episodes: Number of episodes, >= 2.
        mean: Mean of training features, ``(F,)``; None is that of ``features``.
        seed: Seed of the episodes, >= 0.

    Returns:
        ``accuracy``, the mean over the episodes, in 0..1; ``interval``, 1.96 standard errors of it; and ``episodes``,
        the accuracy of each.

    Raises:
        ValueError: If a number is out of range, shapes do not match, or a class has too few images.
    """
    known = labeled(features, labels)
    for name, value, least in (("shots", shots, 1), ("queries", queries, 1), ("episodes", episodes, 2)):
        check_at_least(name, value, least)
    classes = known.labels.unique(sorted=True)  # type: ignore[no-untyped-call]
    rows = [(known.labels == label).nonzero().flatten() for label in classes]
    for label, own in zip(classes.tolist(), rows, strict=True):
        if len(own) < shots + queries:
            rule = f"leave {queries} queries of {len(own)} images (class {label})"
            fail("shots", rule, shots, "Decrease `shots` or `queries`, or leave the class out")
    ways = len(classes) if ways is None else ways
    check_at_least("ways", ways, 2)
    require(ways <= len(classes), "ways", f"be <= {len(classes)}, the number of classes", ways, "Decrease `ways`")
    center = known.features.mean(0) if mean is None else mean.to(known.features)
    unit = F.normalize(known.features - center, dim=1)
    generator = torch.Generator().manual_seed(derived_seed(seed, 6))
    found = []
    for _ in range(episodes):
        chosen = torch.randperm(len(classes), generator=generator)[:ways].tolist()
        drawn = torch.stack(
            [rows[i][torch.randperm(len(rows[i]), generator=generator)[: shots + queries]] for i in chosen]
        )
        means = F.normalize(unit[drawn[:, :shots]].mean(1), dim=1)  # (ways, F)
        nearest = (unit[drawn[:, shots:]] @ means.T).argmax(2)  # (ways, queries)
        own = torch.arange(ways, device=nearest.device).unsqueeze(1)
        found.append(float((nearest == own).double().mean()))
    values = torch.tensor(found, dtype=torch.float64)
    interval = 1.96 * float(values.std(correction=0)) / math.sqrt(episodes)
    return {"accuracy": float(values.mean()), "interval": interval, "episodes": found}


def label_efficiency(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    shares: Sequence[float] = (0.01, 0.1, 0.5, 1.0),
    repeats: int = 3,
    c: float = 0.1,
    seed: int = 0,
) -> dict[float, dict[str, float]]:
    """Fit logistic regression on standardized features to random shares of the labels.

    Each draw holds the same share of each class, at least one image.

    Args:
        train: Features ``(N, F)``, floating.
        train_labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        test: Features ``(M, F)``.
        test_labels: Classes ``(M,)``.
        shares: Shares of the labeled rows, in (0, 1].
        repeats: Draws per share, >= 1; the whole set is fitted once.
        c: Inverse of the L2 penalty, > 0.
        seed: Seed of the draws, >= 0.

    Returns:
        By share ``accuracy``, the mean over the draws, ``lowest`` and ``highest`` of them, in 0..1, and ``images``, the
        number of labels.

    Raises:
        ValueError: If a number is out of range, shapes do not match, or there is one class only.
    """
    given = split(train, train_labels, test, test_labels)
    check_at_least("repeats", repeats, 1)
    found = {}
    for share in shares:
        check_interval("shares", share, "(0, 1]", "0.01 is one percent of the labels")
        values, number = [], 0
        for repeat in range(repeats if share < 1 else 1):
            if share < 1:
                rows = class_share(given.train.labels, share, derived_seed(seed, repeat))
            else:
                rows = torch.arange(len(given.train.labels))
            number = len(rows)
            fitted = logistic_probe(
                given.train.features[rows],
                given.train.labels[rows],
                *given.test,
                c=c,
                standardize=True,
            )
            values.append(fitted.top1)
        mean = sum(values) / len(values)
        found[share] = {"accuracy": mean, "lowest": min(values), "highest": max(values), "images": number}
    return found
