"""Sample ids that exclude false negatives: images that show the same."""

from typing import Any, Literal, TypeAlias

from torch import Tensor

from lightning_contrast._checks import check_choice
from lightning_contrast.contracts import require_indices, require_labels

SameImages: TypeAlias = Literal["label", "index"]


def check_mask_same(mask_same: SameImages | None) -> SameImages | None:
    """Check the argument ``mask_same`` of a method and return it."""
    check_choice("mask_same", mask_same, (None, "label", "index"))
    return mask_same


def sample_ids(batch: Any, mask_same: SameImages | None, method: str) -> Tensor | None:
    """Return the labels or indices of a batch, ``(B,)``, which are equal for images that show the same.

    Ids below 0 are unknown; the losses treat such images as negatives of all others.

    Args:
        batch: A training batch.
        mask_same: "label", "index", or None for no ids.
        method: Name of the method, for the error text.

    Raises:
        ValueError: If the batch has none.
    """
    if mask_same is None:
        return None
    return require_labels(batch, method) if mask_same == "label" else require_indices(batch, method)
