"""Look-up and checks of the labels of a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.contracts import split_batch

Labels: TypeAlias = str | int | Callable[[Any], Tensor] | None
"""Where the labels of a batch are, see `find_labels`."""


def find_labels(batch: Any, source: Labels, owner: str) -> Any:
    """Look up the labels of a batch, of any type and shape.

    Args:
        batch: A batch of the loader, with images or with views.
        source: None follows the batch contract, a str is the key of a dict batch, an int the index into a tuple or list
            batch, a callable is applied to the whole batch.
        owner: Name of the callback, for messages.

    Raises:
        ValueError: If the batch has no labels there.
    """
    hint = f"{owner} needs labels: yield (images, labels) from the loader, or name their place with `labels=`"
    if callable(source):
        return source(batch)
    if source is None:
        found = split_batch(batch)[1]
        if found is None:
            fail("labels", "be in the batch", type(batch).__name__, hint)
        return found
    if isinstance(source, str):
        if not isinstance(batch, Mapping) or source not in batch:
            keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            fail("labels", f"name a key of the batch ({source!r} is none)", keys, hint)
        return batch[source]
    size = len(batch) if isinstance(batch, Sequence) else 0
    require(-size <= source < size, "labels", f"be an index into a batch of {size} items", source, hint)
    return batch[source]


def read_labels(batch: Any, source: Labels, owner: str) -> Tensor:
    """Look up the classes of a batch; the arguments are those of `find_labels`.

    Returns:
        ``(B,)``, int64.

    Raises:
        TypeError: If the labels are not a tensor of integers.
        ValueError: If there are no labels, or their shape is not ``(B,)``.
    """
    return class_targets(find_labels(batch, source, owner))


def class_targets(found: Any) -> Tensor:
    """Check labels and convert them to classes.

    Args:
        found: Labels as the batch holds them.

    Returns:
        ``(B,)``, int64.

    Raises:
        TypeError: If they are not a tensor of integers.
        ValueError: If their shape is not ``(B,)``.
    """
    hint = "Give one class index per image"
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        what = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
        fail("labels", "be a tensor of integer classes", what, hint, TypeError)
    require(found.ndim == 1, "labels", "have the shape (B,)", tuple(found.shape), hint)
    return found.long()
