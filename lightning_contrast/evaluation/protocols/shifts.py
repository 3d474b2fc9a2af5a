"""Classifiers of frozen features under a shift of the data: a long tail of classes, and unseen groups."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_interval, fail, require
from lightning_contrast.evaluation.protocols.inputs import labeled, split
from lightning_contrast.evaluation.protocols.logistic import logistic_probe
from lightning_contrast.seeding import derived_seed


def long_tail_rows(labels: Tensor, *, imbalance: float = 100.0, seed: int = 0) -> Tensor:
    """Draw a training set whose class sizes fall exponentially, as those of CIFAR-10-LT (arxiv.org/abs/1901.05555).

    The classes are ordered by their size, of equal ones by their number (CIFAR-LT: by their number, all are equally
    large). Class i of C gets the size of the largest times ``imbalance ** (-i / (C - 1))``, rounded down, at least one
    image and at most those that it has.

    Args:
        labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are not drawn.
        imbalance: Size of the largest class divided by that of the smallest, >= 1.
        seed: Seed of the draw, >= 0.

    Returns:
        Rows, ascending, ``(A,)``.

    Raises:
        ValueError: If ``imbalance`` is below 1 or there are fewer than two classes.

    Example:
        >>> rows = long_tail_rows(torch.arange(300) % 3, imbalance=100)
        >>> torch.bincount(rows % 3).tolist()
        [100, 10, 1]
    """
    check_interval("imbalance", imbalance, "[1, inf)", "100 is usual")
    counts = torch.bincount(labels[labels >= 0])
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
    require(len(order) > 1, "labels", "hold two classes or more", len(order), "A tail needs several classes")
    generator = torch.Generator().manual_seed(derived_seed(seed, 16))
    found = []
    for place, label in enumerate(order):
        size = int(counts[order[0]]) * imbalance ** (-place / (len(order) - 1))
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        found.append(rows[: max(1, int(size + 1e-9))])
    return torch.cat(found).sort().values


def long_tail(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    imbalance: float = 100.0,
    many: int = 100,
    few: int = 20,
    c: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit logistic regression to an exponentially imbalanced subset, and judge frequent and rare classes on their own.

    Classes with more than ``many`` training images in the subset, those with fewer than ``few``, and those between, as
    in https://arxiv.org/abs/1904.05160: the accuracy of each set is the mean of the accuracies of its classes. The
    backbone is frozen and may have seen all images; only the head has a long tail.

    Args:
        train: Features ``(N, F)``, floating.
        train_labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        test: Features ``(M, F)``.
        test_labels: Classes ``(M,)``.
        imbalance: See `long_tail_rows`.
        many: Training images that a class of "many" exceeds, >= ``few``.
        few: Training images that a class of "few" does not reach, >= 1.
        c: Inverse of the penalty of the regression on standardized features, > 0.
        seed: Seed of the draw, >= 0.

    Returns:
        ``result``, a `ProbeResult` for all test rows; ``counts``, training images in the subset by class, ``(C,)``;
        ``all``, ``many``, ``medium`` and ``few``: classes that have test rows, as lists.

    Raises:
        ValueError: If a number is out of range, shapes do not match, or there is one class only.
    """
    check_at_least("few", few, 1)
    check_at_least("many", many, few)
    given = split(train, train_labels, test, test_labels)
    rows = long_tail_rows(given.train.labels, imbalance=imbalance, seed=seed)
    found = logistic_probe(given.train.features[rows], given.train.labels[rows], *given.test, c=c, standardize=True)
    counts = torch.bincount(given.train.labels[rows], minlength=given.num_classes)
    shown = sorted(set(given.test.labels.tolist()))
    sets = {
        "all": shown,
        "many": [label for label in shown if counts[label] > many],
        "medium": [label for label in shown if few <= counts[label] <= many],
        "few": [label for label in shown if counts[label] < few],
    }
    return {"result": found, "counts": counts, **sets}


def class_mean_accuracy(
    correct: Tensor, labels: Tensor, classes: Sequence[int], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Return the mean of the accuracies of classes, and its 95 % percentile interval by bootstrap within each class.

    Args:
        correct: Whether each image is right, ``(N,)`` bool.
        labels: Classes ``(N,)``, integers.
        classes: Classes that count, at least one; each has images.
        resamples: Draws, >= 100.
        seed: Seed of the draws, >= 0.

    Returns:
        ``accuracy``, ``low`` and ``high``, in 0..1.

    Raises:
        ValueError: If shapes do not match, a number is out of range, or a class has no images.

    Example:
        >>> right = torch.tensor([True, True, True, False, False])
        >>> class_mean_accuracy(right, torch.tensor([0, 0, 0, 0, 1]), [0, 1])["accuracy"]
        0.375
    """
    check_at_least("resamples", resamples, 100)
    shapes = tuple(correct.shape), tuple(labels.shape)
    require(correct.shape == labels.shape, "labels", "have the shape (N,) of `correct`", shapes, "Give one per image")
    require(len(classes) > 0, "classes", "name at least one class", list(classes), "Give (0, 1), for example")
    shares, sizes = [], []
    for label in classes:
        own = correct[labels == label]
        require(len(own) > 0, "classes", "have images", label, "Leave classes without test images out")
        shares.append(float(own.double().mean()))
        sizes.append(len(own))
    generator = torch.Generator().manual_seed(derived_seed(seed, 17))
    number = torch.tensor(sizes, dtype=torch.float64).expand(resamples, -1)
    drawn = torch.binomial(number, torch.tensor(shares, dtype=torch.float64).expand(resamples, -1), generator=generator)
    ends = (drawn / number).mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"accuracy": sum(shares) / len(shares), "low": ends[0], "high": ends[1]}


def unseen_groups(
    train: Tensor,
    train_labels: Tensor,
    train_groups: Tensor,
    test: Tensor,
    test_labels: Tensor,
    test_groups: Tensor,
    *,
    c: float = 0.1,
    least: int = 5,
    seed: int = 0,
) -> dict[int, dict[str, Any]]:
    """Judge classifiers on groups, such as artists or scanners, of which they have seen no image.

    For each group, logistic regression on standardized features is fitted to the training images of all other groups,
    and judged on the test images of the group. The control is fitted to exactly as many training images of all groups,
    with the same share of each class and group up to rounding, and judged on the same test images: the difference is
    what the unseen group costs the head. The backbone is frozen and may have seen the group.

    Args:
        train: Features ``(N, F)``, floating.
        train_labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        train_groups: Groups ``(N,)``, integers; -1 for rows of no group, which are left out.
        test: Features ``(M, F)``.
        test_labels: Classes ``(M,)``.
        test_groups: Groups ``(M,)``.
        c: Inverse of the penalty, > 0.
        least: Test images that a group needs to be judged, >= 1.
        seed: Seed of the draw of the control, >= 0.

    Returns:
        By group ``unseen`` and ``seen``, `ProbeResult` for the same test rows each, and ``images``, the numbers of
        training images of both, which are equal.

    Raises:
        ValueError: If shapes do not match, or no group can be left out and judged.
    """
    check_at_least("least", least, 1)
    groups = {"train": train_groups, "test": test_groups}
    for name, features, own in (("train_groups", train, train_groups), ("test_groups", test, test_groups)):
        whole = own.shape == features.shape[:1] and not own.is_floating_point()
        got = f"{tuple(own.shape)} {own.dtype}"
        require(whole, name, f"be integers of shape ({len(features)},)", got, "Give one group per row of features")
    known = {
        "train": (train_labels >= 0) & (train_groups >= 0),
        "test": (test_labels >= 0) & (test_groups >= 0),
    }
    learned = labeled(train[known["train"]], train_labels[known["train"]], "train_labels")
    judged = labeled(test[known["test"]], test_labels[known["test"]], "test_labels")
    of_train, of_test = (groups[name][known[name]].long() for name in ("train", "test"))
    present = sorted(set(of_train.tolist()))
    cells = learned.labels * (1 + max(present)) + of_train
    found = {}
    for group in present:
        rest, own = of_train != group, of_test == group
        number = int(rest.sum())
        if int(own.sum()) < least or number < 2:
            continue
        # Evenly from rows by class, in it by group in random order (so that rounding favors none), in that at random.
        generator = torch.Generator().manual_seed(derived_seed(seed, group))
        order, ranks = (
            torch.randperm(size, generator=generator).to(cells.device) for size in (len(rest), 1 + int(cells.max()))
        )
        for keys in (ranks[cells], learned.labels):
            order = order[keys[order].argsort(stable=True)]
        control = order[torch.arange(number, device=cells.device) * len(order) // number].sort().values
        if any(len(set(learned.labels[rows].tolist())) < 2 for rows in (rest, control)):
            continue
        queries = judged.features[own], judged.labels[own]
        unseen = logistic_probe(learned.features[rest], learned.labels[rest], *queries, c=c, standardize=True)
        seen = logistic_probe(learned.features[control], learned.labels[control], *queries, c=c, standardize=True)
        found[group] = {"unseen": unseen, "seen": seen, "images": (number, len(control))}
    if not found:
        hint = "Give two groups or more, with training images of two classes in the others"
        fail("test_groups", f"have a group with {least} test images that can be left out", present, hint)
    return found
