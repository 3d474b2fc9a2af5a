"""What some methods need of a batch beside its views."""

from typing import Any

from torch import Tensor

from lightning_contrast._checks import fail
from lightning_contrast.contracts import batch_indices, split_batch


def require_labels(batch: Any, method: str) -> Tensor:
    """Return the labels ``(B,)`` of a batch.

    Args:
        batch: A training batch.
        method: Name of the method that needs them.

    Raises:
        ValueError: If there are none.
    """
    _, labels = split_batch(batch)
    if labels is None:
        mend = 'Yield (images, labels) or a dict with "label" from the loader'
        fail("batch", f"hold labels for {method}", "none", mend)
    return labels


def require_indices(batch: Any, method: str) -> Tensor:
    """Return the sample indices ``(B,)`` of a batch.

    Args:
        batch: A training batch.
        method: Name of the method that needs them.

    Raises:
        ValueError: If there are none.
    """
    indices = batch_indices(batch)
    if indices is None:
        mend = 'Set `indices=True` on the data module, or yield (images, labels, indices) or a dict with "index"'
        fail("batch", f"hold sample indices for {method}", "none", mend)
    return indices
