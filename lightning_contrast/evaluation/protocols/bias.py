"""Audits of features for a protected attribute: associations, retrieval and a probe on paired images."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, require
from lightning_contrast.evaluation.protocols.inputs import labeled
from lightning_contrast.evaluation.protocols.linear import ProbeResult
from lightning_contrast.evaluation.protocols.logistic import logistic_probe
from lightning_contrast.evaluation.protocols.retrieval import retrieved
from lightning_contrast.metrics import association_test


def association_audit(
    first: Tensor,
    second: Tensor,
    concepts: Mapping[str, tuple[Tensor, Tensor]],
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Test whether two groups of images are associated with concepts in different ways (`metrics.association_test`).

    Args:
        first: Features of the first group, ``(N, F)``, such as men.
        second: Features of the second, ``(N, F)``, such as women.
        concepts: By name features that stand for a concept ``(A, F)``, and features that stand for its opposite or for
            everything else ``(B, F)``.
        permutations: Partitions per test, >= 1.
        seed: Seed of the partitions, >= 0.

    Returns:
        By concept ``effect``, the effect size d in about -2 .. 2, > 0 if the first group is closer to it; and ``p``,
        two-sided: twice the smaller p-value of both directions, at most 1. With many concepts, some are below 0.05 by
        chance.

    Raises:
        ValueError: If widths differ, or the groups have not equally many rows.
        TypeError: If features are not floating.
    """
    found = {}
    for name, (concept, rest) in concepts.items():
        ahead, behind = (
            association_test(x, y, concept, rest, permutations=permutations, seed=seed)
            for x, y in ((first, second), (second, first))
        )
        found[name] = {"effect": float(ahead.effect), "p": min(1.0, 2 * min(ahead.p_value, behind.p_value))}
    return found


def twin_retrieval(
    features: Tensor, labels: Tensor, first: Tensor, second: Tensor, *, k: int = 10
) -> dict[str, Tensor]:
    """Return how well images of two groups retrieve their class, and how far their neighbors are of their own group.

    Args:
        features: Features of all images ``(N, F)``, floating; L2-normalized here.
        labels: Classes ``(N,)``, integers >= 0.
        first: Rows of the first group, ``(P,)`` integers; row i of both is a pair, such as one person as man and woman.
        second: Rows of the second, ``(P,)``.
        k: Neighbors among the pairs, 1 to 2 P - 1.

    Returns:
        ``(P,)`` float64 each: ``first`` and ``second``, the average precision of the retrieval of their class among all
        other images; ``own_first`` and ``own_second``, the share of the k nearest other images of both groups that are
        of the own group, (P - 1) / (2 P - 1) by chance.

    Raises:
        ValueError: If shapes do not match, ``k`` is out of range, or a query is alone in its class.
    """
    known = labeled(features, labels)
    require(len(known.labels) == len(labels), "labels", "be >= 0", "unlabeled rows", "Leave unlabeled images out")
    _check_pairs(first, second, len(labels))
    pairs = len(first)
    check_at_least("k", k, 1)
    require(k < 2 * pairs, "k", f"be <= {2 * pairs - 1}, the number of other images", k, "Decrease `k`")
    counts = torch.bincount(known.labels)[known.labels]
    rows = torch.cat([first, second]).long()
    alone = bool((counts[rows] < 2).any())
    require(not alone, "labels", "have another image of the class of each query", "none", "Leave such pairs out")
    precision = retrieved(features, labels, k=(1,))["map"]  # of the images that are not alone in their class
    place = (counts > 1).long().cumsum(0) - 1
    values = precision[place[rows]].double()
    unit = F.normalize(known.features[rows], dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-torch.inf)
    of_first = torch.arange(2 * pairs, device=unit.device) < pairs
    nearest = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    own = (of_first[nearest] == of_first.unsqueeze(1)).double().mean(1)
    return {
        "first": values[:pairs].cpu(),
        "second": values[pairs:].cpu(),
        "own_first": own[:pairs].cpu(),
        "own_second": own[pairs:].cpu(),
    }


def attribute_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, c: float = 0.1) -> ProbeResult:
    """Fit a linear classifier of a protected attribute, which says whether it can be read from the features at all.

    Logistic regression on standardized features. Chance is 0.5 if both groups are equally large.

    Args:
        train: Training features of both groups, ``(N, F)`` and ``(M, F)``.
        test: Test features of both groups, of other persons, ``(P, F)`` and ``(Q, F)``.
        c: Inverse of the penalty, > 0.

    Returns:
        As `logistic_probe`: logits ``(P + Q, 2)`` and labels, 0 for the first group.

    Raises:
        ValueError: If shapes do not match or a group is empty.
    """
    labels = []
    for name, of in (("train", train), ("test", test)):
        for features in of:
            require(len(features) > 0, name, "have images of both groups", len(features), "Give features of both")
        labels.append(torch.arange(2).repeat_interleave(torch.tensor([len(features) for features in of])))
    return logistic_probe(torch.cat(train), labels[0], torch.cat(test), labels[1], c=c, standardize=True)


def _check_pairs(first: Tensor, second: Tensor, rows: int) -> None:
    fits = first.shape == second.shape and first.ndim == 1 and len(first) > 0
    got = tuple(first.shape), tuple(second.shape)
    require(fits, "second", "have the shape (P,) of `first`, P >= 1", got, "Row i of both is a pair")
    inside = int(torch.cat([first, second]).min()) >= 0 and int(torch.cat([first, second]).max()) < rows
    require(inside, "first", f"name rows in 0..{rows - 1}", "another one", "Give rows of `features`")
