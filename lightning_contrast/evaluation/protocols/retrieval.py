"""Protocols of neighbors: k-NN for several k and temperatures, and retrieval of images of the same class."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_positive, require
from lightning_contrast.evaluation.protocols.inputs import accuracy, labeled, split
from lightning_contrast.evaluation.protocols.linear import ProbeResult
from lightning_contrast.metrics.neighbours import nearest_neighbours, vote

_CHUNK = 1024


def knn_sweep(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: Sequence[float] = (0.07,),
) -> dict[tuple[int, float], ProbeResult]:
    """Classify by the weighted vote of k nearest neighbors for several k and temperatures, with one search.

    The protocol of DINO's ``eval_knn.py`` (https://arxiv.org/abs/2104.14294) by default; NPID, MoCo and lightly use a
    temperature of 0.1 and k = 200. The figure of the best k is chosen on the test set, as the papers do.

    Args:
        train: Features ``(N, F)``, floating; L2-normalized here.
        train_labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        test: Features ``(M, F)``; L2-normalized here.
        test_labels: Classes ``(M,)``.
        k: Numbers of neighbors, each from 1 to the number of labeled training rows.
        temperature: Divisors of the cosine similarities, each > 0.

    Returns:
        Accuracy and logarithms of the votes ``(M, C)`` by (k, temperature).

    Raises:
        ValueError: If a number is out of range, shapes do not match, or there is one class only.
    """
    given = split(train, train_labels, test, test_labels)
    require(len(k) > 0 and len(temperature) > 0, "k", "hold at least one number", list(k), "Give (20,), for example")
    for number in k:
        check_at_least("k", number, 1)
    for divisor in temperature:
        check_positive("temperature", divisor)
    similarities, rows = nearest_neighbours(given.test.features, given.train.features, max(k))
    classes = given.train.labels[rows]
    found = {}
    for number in k:
        for divisor in temperature:
            shares = vote(
                similarities[:, :number], classes[:, :number], num_classes=given.num_classes, temperature=divisor
            )
            top1 = accuracy(shares, given.test.labels)
            settings = {"k": number, "temperature": divisor}
            found[number, divisor] = ProbeResult(top1, shares.log(), given.test.labels, settings)
    return found


def label_retrieval(features: Tensor, labels: Tensor, *, k: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Retrieve images of the same class among all others by cosine similarity.

    Args:
        features: ``(N, F)``, floating; L2-normalized here.
        labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        k: Ranks of the recall, each from 1 to N - 1.

    Returns:
        ``recall@{k}``, the share of images with one of their class among the k nearest; and ``map``, the mean average
        precision over the whole ranking, as scikit-learn computes it. Images that are alone in their class are no
        queries. In 0..1.

    Raises:
        ValueError: If a number is out of range, shapes do not match, or no class has two images.
    """
    found = retrieved(features, labels, k=k)
    return {name: float(values.double().mean()) for name, values in found.items()}


def retrieved(features: Tensor, labels: Tensor, *, k: Sequence[int] = (1, 5, 10)) -> dict[str, Tensor]:
    """Return the values that `label_retrieval` averages, one per query.

    Args:
        features: ``(N, F)``, floating; L2-normalized here.
        labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        k: Ranks of the recall, each from 1 to N - 1.

    Returns:
        ``recall@{k}``, bool, and ``map``, the average precision, float64; ``(Q,)`` in the order of the images.

    Raises:
        ValueError: As `label_retrieval`.
    """
    known = labeled(features, labels)
    unit, classes = F.normalize(known.features, dim=1), known.labels
    limit = len(unit) - 1
    for number in k:
        check_at_least("k", number, 1)
        require(number <= limit, "k", f"be <= {limit}, the number of other images", number, "Decrease `k`")
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(unit), _CHUNK):
        chunk = unit[start : start + _CHUNK]
        similarity = chunk @ unit.T
        similarity.diagonal(offset=start).fill_(-torch.inf)  # last in the order
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :-1]
        same = classes[order] == classes[start : start + len(chunk)].unsqueeze(1)  # (B, N - 1)
        same = same[same.any(1)]
        ranks = torch.arange(1, limit + 1, device=unit.device)
        precision = same.double().cumsum(1) / ranks
        found = {f"recall@{number}": same[:, :number].any(1) for number in k}
        parts.append(found | {"map": (precision * same).sum(1) / same.sum(1)})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    hint = "Retrieval needs images of one class"
    require(len(joined["map"]) > 0, "labels", "hold a class with two images", "none", hint)
    return joined
