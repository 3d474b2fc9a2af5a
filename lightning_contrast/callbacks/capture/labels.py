"""Labels of a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.contracts import split_batch

Labels: TypeAlias = str | int | Callable[[Any], Tensor] | None


def find_labels(batch: Any, source: Labels, owner: str) -> Any:
    """Return what stands where the labels of a batch should be.

    Args:
        batch: What the loader gave, with views in the place of images or not.
        source: See `OnlineProbe`.
        owner: Name of the callback, for messages.

    Raises:
        ValueError: If there is nothing.
    """
    hint = f"{owner} needs labels: let the loader yield (images, labels), or say where they are with `labels=`"
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
    """Return the classes (B,) of a batch, int64; arguments are those of `find_labels`.

    Raises:
        TypeError: If what stands there is not a tensor of integers.
        ValueError: If there is nothing, or it has another shape.
    """
    return class_targets(find_labels(batch, source, owner))


def class_targets(found: Any) -> Tensor:
    """Return classes (B,), int64, as they were found in a batch.

    Raises:
        TypeError: If they are not a tensor of integers.
        ValueError: If they do not have the shape (B,).
    """
    hint = "Give one class number for each image"
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        what = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
        fail("labels", "be a tensor of integer classes", what, hint, TypeError)
    require(found.ndim == 1, "labels", "have the shape (B,)", tuple(found.shape), hint)
    return found.long()
