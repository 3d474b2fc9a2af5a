"""Classes of the images of all ranks, and the one rule for unknown ones."""

import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast.losses.checks import check_floating

_RANK_STRIDE = 2**32  # more than the images of a rank


def separate_unknown(labels: Tensor) -> Tensor:
    """Replace each label below 0, which means unknown, by a class of its own.

    Every loss and method that compares labels or sample ids applies this rule: an unknown image is of no other image's
    class. Applied twice, it changes nothing but the numbers of these classes.

    Args:
        labels: Classes or ids of the images of this rank, ``(B,)`` integers.

    Returns:
        Labels ``(B,)``; those that were unknown are below 0 and differ from each other and from those of other ranks.
    """
    first = torch.iinfo(torch.int64).min + distributed.rank() * _RANK_STRIDE
    own = torch.arange(first, first + len(labels), device=labels.device)
    return torch.where(labels < 0, own, labels)


def global_classes(labels: Tensor | None, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Gather the classes of the rows of all ranks.

    Args:
        labels: Class of each row of this rank, ``(B,)`` integers; below 0: unknown. None: all are unknown.
        size: Number of rows of this rank, B.
        device: Device of the embeddings.

    Returns:
        The class of each row of this rank, ``(B,)``, and of all ranks in rank order, ``(N,)``; each unknown row is a
        class of its own. Without labels the class is the position in the global batch.
    """
    if labels is not None:
        classes = separate_unknown(labels)
        return classes, distributed.gather(classes)
    sizes = distributed.batch_sizes(size, device)
    classes = torch.arange(sum(sizes), device=device)
    start = sum(sizes[: distributed.rank()])
    return classes[start : start + size], classes


def class_sums(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count, for each row of this rank, the rows of all ranks with the same label.

    Args:
        z: Embeddings, ``(N, D)``.
        labels: ``(N,)`` integers of any value.

    Returns:
        Sums ``(N, D)`` with gradient, and counts ``(N,)``.
    """
    check_floating("z", z)
    all_rows, all_labels = distributed.gather_with_gradient(z), distributed.gather(labels)
    # Positions in the sorted labels number the classes; `unique` would give shapes that depend on the data.
    ordered = all_labels.sort().values
    all_slots = torch.searchsorted(ordered, all_labels)
    own_slots = torch.searchsorted(ordered, labels) if distributed.is_distributed() else all_slots
    sums = torch.zeros_like(all_rows).index_add(0, all_slots, all_rows)
    return sums[own_slots], torch.searchsorted(ordered, labels, right=True) - own_slots
