"""Checks and splits of labeled features that all protocols share."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_interval, fail, require
from lightning_contrast.metrics.neighbours import check_features
from lightning_contrast.seeding import derived_seed


class Labeled(NamedTuple):
    """Features ``(N, F)``, float32, and classes ``(N,)``, int64, without unlabeled rows."""

    features: Tensor
    labels: Tensor


class Split(NamedTuple):
    """Labeled features to learn from and to judge by, and the number of classes."""

    train: Labeled
    test: Labeled
    num_classes: int


def labeled(features: Tensor, labels: Tensor | None, name: str = "labels") -> Labeled:
    """Return labeled features; rows with the label -1 are left out.

    Args:
        features: ``(N, F)``, floating.
        labels: ``(N,)``, integers >= -1.
        name: Name of the labels, for messages.

    Raises:
        ValueError: If shapes do not match, or there are no labels.
    """
    check_features("features", features)
    if labels is None:
        fail(name, "be given", None, "Give a loader that yields (images, labels)")
    whole = labels.shape == features.shape[:1] and not labels.is_floating_point() and labels.dtype != torch.bool
    got = f"{tuple(labels.shape)} {labels.dtype}"
    require(whole, name, f"be integers of shape ({len(features)},)", got, "Give one class per row of features")
    known = labels >= 0
    require(bool(known.any()), name, "have labeled rows", "none", "-1 means unlabeled")
    if bool(known.all()):  # no copy of the features
        return Labeled(features.detach().float(), labels.long())
    return Labeled(features.detach()[known].float(), labels[known].long())


def check_image_labels(images: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless each image has a class.

    Args:
        images: ``(N, C, H, W)``, N >= 1.
        labels: ``(N,)``, integers >= 0.
    """
    fits = labels.shape == (len(images),) and not labels.is_floating_point()
    require(fits, "labels", f"be integers of shape ({len(images)},)", tuple(labels.shape), "Give one class per image")
    require(len(images) > 0, "images", "hold at least one image", 0, "Give labeled images")
    least = int(labels.min())
    require(least >= 0, "labels", "be >= 0", least, "Leave unlabeled images out")


def split(train: Tensor, train_labels: Tensor | None, test: Tensor, test_labels: Tensor | None) -> Split:
    """Return the labeled rows of two sets of features.

    Args:
        train: ``(N, F)``, floating.
        train_labels: ``(N,)``, integers >= -1.
        test: ``(M, F)``, floating.
        test_labels: ``(M,)``, integers >= -1.

    Raises:
        ValueError: If shapes do not match, there are no labels, or only one class.
    """
    learned, judged = labeled(train, train_labels, "train_labels"), labeled(test, test_labels, "test_labels")
    widths = (train.shape[1], test.shape[1])
    require(widths[0] == widths[1], "test", "be as wide as `train`", widths, "Use features of the same layer")
    several = bool((learned.labels != learned.labels[0]).any())
    hint = "A classifier needs at least two classes"
    require(several, "train_labels", "hold two classes or more", f"only class {int(learned.labels[0])}", hint)
    return Split(learned, judged, 1 + int(torch.cat([learned.labels, judged.labels]).max()))


def held_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide rows by class at random: at least one row of each class stays, if it has several one is held out.

    Args:
        labels: Classes ``(N,)``.
        share: Share of each class that is held out, in (0, 1).
        seed: Seed of the draw, >= 0.

    Returns:
        Rows that stay and rows that are held out, ascending, ``(A,)`` and ``(B,)``.
    """
    check_interval("share", share, "(0, 1)", "0.1 holds out a tenth of each class")
    generator = torch.Generator().manual_seed(derived_seed(seed, 1))
    stay, out = [], []
    for label in labels.unique(sorted=True):  # type: ignore[no-untyped-call]
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        number = min(len(rows) - 1, max(1, round(share * len(rows))))
        out.append(rows[:number])
        stay.append(rows[number:])
    return torch.cat(stay).sort().values, torch.cat(out).sort().values


def class_share(labels: Tensor, share: float, seed: int) -> Tensor:
    """Draw a share of the rows of each class, at least one.

    Args:
        labels: Classes ``(N,)``.
        share: Share of each class, in (0, 1).
        seed: Seed of the draw, >= 0.

    Returns:
        Rows, ascending, ``(A,)``.
    """
    stay, _ = held_out(labels, 1 - share, seed)
    return stay


def per_class(labels: Tensor, number: int, seed: int) -> Tensor:
    """Draw rows of each class without repetition.

    Args:
        labels: Classes ``(N,)``.
        number: Rows per class, >= 1.
        seed: Seed of the draw, >= 0.

    Returns:
        Rows, by class, ``(classes * number,)``.

    Raises:
        ValueError: If a class has fewer rows.
    """
    check_at_least("number", number, 1)
    generator = torch.Generator().manual_seed(derived_seed(seed, 2))
    found = []
    for label in labels.unique(sorted=True):  # type: ignore[no-untyped-call]
        rows = (labels == label).nonzero().flatten()
        hint = f"Class {int(label)} has {len(rows)} images"
        require(len(rows) >= number, "shots", f"be <= {len(rows)}", number, hint)
        found.append(rows[torch.randperm(len(rows), generator=generator)[:number]])
    return torch.cat(found)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest logit ``(N, C)`` is that of the label ``(N,)``, in 0..1."""
    return float((logits.argmax(1) == labels).double().mean())
