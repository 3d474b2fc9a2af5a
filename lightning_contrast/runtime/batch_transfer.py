"""Transforms of batches on the device, right after the strategy has transferred them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import require
from lightning_contrast.contracts import IMAGE_KEY, Images, ImageSource, is_views, replace_images, split_batch

HOOK = "batch_to_device"


class BatchTransforms:
    """Replacement of a strategy's ``batch_to_device`` that applies transforms to the transferred batch.

    A strategy has at most one, with a list of transforms, so that callbacks can be added and removed in any order.

    Args:
        strategy: The Trainer's strategy, whose ``batch_to_device`` is wrapped.
    """

    def __init__(self, strategy: Any) -> None:
        self.inner = getattr(strategy, HOOK)
        self.own_attribute = HOOK in vars(strategy)
        self.transforms: list[Callable[[Any], Any]] = []

    def __call__(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch to the device and apply the transforms there."""
        batch = self.inner(batch, device=device, dataloader_idx=dataloader_idx)
        for transform in self.transforms:
            batch = transform(batch)
        return batch

    @classmethod
    def add(cls, strategy: Any, transform: Callable[[Any], Any], *, first: bool = False) -> None:
        """Apply ``transform`` to every batch, after all others or ``first``; adding it twice has no effect."""
        current = vars(strategy).get(HOOK)
        if not isinstance(current, cls):
            current = cls(strategy)
            setattr(strategy, HOOK, current)
        if transform not in current.transforms:
            current.transforms.insert(0 if first else len(current.transforms), transform)

    @classmethod
    def remove(cls, strategy: Any, transform: Callable[[Any], Any]) -> None:
        """Remove ``transform``; without transforms the strategy gets its own method back."""
        current = vars(strategy).get(HOOK)
        if not isinstance(current, cls):
            return
        if transform in current.transforms:
            current.transforms.remove(transform)
        if not current.transforms:
            if current.own_attribute:
                setattr(strategy, HOOK, current.inner)
            else:
                delattr(strategy, HOOK)


def map_batches(batch: Any, transform: Callable[[Any], Any], loaders: Any = None) -> Any:
    """Transform a batch, or each batch of a collection from a `CombinedLoader`.

    Args:
        batch: A batch of the contract, or a list, tuple or dict of batches; None for an exhausted loader.
        transform: Function of one batch of the contract.
        loaders: The loader of the batch, or the collection of loaders. None if unknown, as in evaluation: collections
            are then recognized by their structure.
    """
    if batch is None:
        return None
    many = _is_collection(batch) if loaders is None else isinstance(loaders, Mapping | list | tuple)
    if not many:
        return transform(batch)
    if isinstance(batch, Mapping):
        return {key: map_batches(one, transform, loaders and loaders[key]) for key, one in batch.items()}
    of_each = loaders or [None] * len(batch)
    return type(batch)(map_batches(one, transform, of) for one, of in zip(batch, of_each, strict=True))


def _is_collection(batch: Any) -> bool:
    """Return whether a value is a collection of batches and not one batch."""
    if isinstance(batch, Mapping):
        items = [item for item in batch.values() if item is not None]
        batches = all(isinstance(item, Mapping | list | tuple) and not is_views(item) for item in items)
        return IMAGE_KEY not in batch and batches
    if not isinstance(batch, list | tuple) or hasattr(batch, "_replace"):
        return False
    first = next((item for item in batch if item is not None), None)
    return isinstance(first, Mapping | list | tuple) and not is_views(first)


def transform_images(
    batch: Any, transform: Callable[[Tensor], Images], views: Callable[[list[Tensor]], Images], source: ImageSource
) -> Any:
    """Return a copy of the batch with transformed images.

    Args:
        batch: A batch of the contract.
        transform: Function of the images ``(B, C, H, W)``.
        views: Function of given views ``(B, C, h, w)``.
        source: See ``images`` of `split_batch`.

    Raises:
        ValueError: If images of another shape have not one row per label.
    """
    images, labels = split_batch(batch, source)
    if isinstance(images, Tensor) and images.ndim != 4 and labels is not None:
        agrees = images.shape[:1] == labels.shape[:1]
        require(agrees, "images", "have the shape (B, C, H, W)", tuple(images.shape), "Yield one row per label")
    return replace_images(batch, transform(images) if isinstance(images, Tensor) else views(images), source)
