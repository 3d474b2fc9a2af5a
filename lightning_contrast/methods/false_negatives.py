"""Sample ids that exclude false negatives: images that show the same."""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_choice
from lightning_contrast.contracts import require_indices, require_labels

SameImages: TypeAlias = Literal["label", "index"]
_MAX_BATCH = 2**32  # more than the images of a rank


def check_mask_same(mask_same: SameImages | None) -> SameImages | None:
    """Check the argument ``mask_same`` of a method and return it."""
    check_choice("mask_same", mask_same, (None, "label", "index"))
    return mask_same


def sample_ids(batch: Any, mask_same: SameImages | None, method: str) -> Tensor | None:
    """Return the labels or indices of a batch, ``(B,)``, which are equal for images that show the same.

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


def replace_unknown(ids: Tensor | None) -> Tensor | None:
    """Replace each unknown id (below 0) by one that no other image of any rank and no key of a queue has.

    Args:
        ids: Sample ids ``(B,)``, or None.

    Returns:
        Ids ``(B,)`` for the argument ``groups`` of a loss: images with equal ids are not negatives of each other.
    """
    if ids is None:
        return None
    unique = torch.arange(len(ids), device=ids.device) + distributed.rank() * _MAX_BATCH
    return torch.where(ids < 0, torch.iinfo(torch.int64).min + unique, ids)
