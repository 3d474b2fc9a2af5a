"""What some methods need of a batch beside its views."""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_choice
from lightning_contrast.contracts import require_indices, require_labels

SameImages: TypeAlias = Literal["label", "index"]
_RANK = 2**32  # more than the images of a rank


def check_mask_same(mask_same: SameImages | None) -> SameImages | None:
    """Check what tells images that show the same, and return it."""
    check_choice("mask_same", mask_same, (None, "label", "index"))
    return mask_same


def marks_of(batch: Any, mask_same: SameImages, method: str) -> Tensor:
    """Return what images that show the same have in common, their labels or indices, ``(B,)``.

    Args:
        batch: A training batch.
        mask_same: "label" or "index".
        method: Name of the method that needs them.

    Raises:
        ValueError: If the batch has none.
    """
    return require_labels(batch, method) if mask_same == "label" else require_indices(batch, method)


def groups_of(batch: Any, mask_same: SameImages | None, method: str) -> Tensor | None:
    """Return the group of each image for a loss, ``(B,)``: images of one group are no negatives of each other.

    Args:
        batch: A training batch.
        mask_same: "label", "index", or None for no groups.
        method: Name of the method that needs them.

    Returns:
        The marks, and in the place of each mark below 0, which is unknown, a number that no other image of any rank has
        and no key of a queue.

    Raises:
        ValueError: If the batch has no marks.
    """
    if mask_same is None:
        return None
    marks = marks_of(batch, mask_same, method)
    own = torch.arange(len(marks), device=marks.device) + distributed.rank() * _RANK
    return torch.where(marks < 0, torch.iinfo(torch.int64).min + own, marks)
