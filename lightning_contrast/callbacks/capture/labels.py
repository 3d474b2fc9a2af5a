"""Look-up and checks of the labels and the images of a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.contracts import batch_labels, is_texts, split_batch

Source: TypeAlias = str | int | Callable[[Any], Tensor] | None
"""Where the labels or images of a batch are: the batch contract, a key, an index, or a function of the batch."""

Labels: TypeAlias = Source
"""Where the labels of a batch are, see `find_labels`."""


class UnreadableBatchError(TypeError):
    """A batch does not hold images where they are looked up."""


def check_place(name: str, source: Any) -> None:
    """Check that an argument names a place in a batch.

    Args:
        name: Name of the argument: ``"labels"`` or ``"images"``.
        source: Its value, see `Source`.

    Raises:
        TypeError: If it is neither None, a str, an int nor a callable.
    """
    if not (source is None or isinstance(source, str | int) or callable(source)) or isinstance(source, bool):
        hint = f"Give the key or the index of the {name} in a batch, or a function of the batch"
        fail(name, "be None, a str, an int or a callable", source, hint, TypeError)


def find_images(batch: Any, source: Source = None) -> Tensor:
    """Look up the images of a batch; of a list of views, the first.

    Args:
        batch: A batch of the loader, with images or with views.
        source: None follows the batch contract, a str is the key of a dict batch, an int the index into a tuple or list
            batch, a callable is applied to the whole batch.

    Returns:
        ``(B, ...)``.

    Raises:
        UnreadableBatchError: If there are no images.
    """
    try:
        found = split_batch(batch, source)[0]
    except TypeError as error:
        raise UnreadableBatchError(f"{error} Name the place of the images with `images=`.") from error
    return found if isinstance(found, Tensor) else found[0]


def find_pictures(batch: Any, source: Source = None) -> list[Tensor]:
    """Look up the images or views of a batch that can be shown.

    Args:
        batch: A batch of the loader, with images or with views.
        source: As for `find_images`.

    Returns:
        The images ``(B, C, H, W)`` as the only item, or the views, each ``(B, C, h, w)``.

    Raises:
        UnreadableBatchError: If there are none.
    """
    try:
        found = split_batch(batch, source)[0]
    except TypeError as error:
        raise UnreadableBatchError(f"{error} Name the place of the images with `images=`.") from error
    for each in [found] if isinstance(found, Tensor) else found:
        if each.ndim != 4:
            hint = "Name the place of the images with `images=`"
            fail("batch", "contain images (B, C, H, W)", tuple(each.shape), hint, UnreadableBatchError)
    return [found] if isinstance(found, Tensor) else found


def pixel_range_of(trainer: Any) -> tuple[float, float] | None:
    """Return the ``scale`` of the view policy among the Trainer's callbacks: the values of images that are 0 and 1.

    Args:
        trainer: Trainer whose callbacks are searched.

    Returns:
        None if there is no policy, or it reads uint8 and float in 0..1.
    """
    scales = (getattr(getattr(callback, "policy", None), "scale", None) for callback in trainer.callbacks)
    return next((scale for scale in scales if scale is not None), None)


def warn_unreadable(owner: Any, error: UnreadableBatchError) -> None:
    """Warn that a callback cannot read a batch and logs nothing from here on.

    Args:
        owner: The callback.
        error: What is wrong.
    """
    rank_zero_warn(f"{type(owner).__name__} `{owner.name}` logs nothing, because it cannot read a batch: {error}")


def find_labels(batch: Any, source: Labels, owner: str, *, rows: bool = False) -> Any:
    """Look up the labels of a batch, of any type and shape.

    Args:
        batch: A batch of the loader, with images or with views.
        source: None follows the batch contract, a str is the key of a dict batch, an int the index into a tuple or list
            batch, a callable is applied to the whole batch.
        owner: Name of the callback, for messages.
        rows: Without a source, take 2-D integers for labels ``(B, K)``, and not for the tokens of texts.

    Raises:
        ValueError: If the batch has no labels there.
    """
    hint = f'{owner} needs labels: yield (images, labels) or a dict with "label", or name their place with `labels=`'
    if callable(source):
        return source(batch)
    if source is None:
        found = batch_labels(batch, rows=rows)
        if found is None:
            texts = isinstance(batch, Sequence) and len(batch) > 1 and is_texts(batch[1])
            fail("labels", "be in the batch", "images and texts" if texts else type(batch).__name__, hint)
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


def read_classes(batch: Any, source: Labels, owner: str) -> Tensor | None:
    """Look up the classes of a batch; the arguments are those of `find_labels`.

    Returns:
        ``(B,)``, int64; without a source, None if the labels of the batch are no classes, or there are none.

    Raises:
        TypeError: If the labels of a source are not a tensor of integers.
        ValueError: If there are none, or their shape is not ``(B,)``.
    """
    if source is not None:
        return read_labels(batch, source, owner)
    found = batch_labels(batch)
    usable = found is not None and found.ndim == 1 and not found.is_floating_point() and found.dtype != torch.bool
    return found.long() if usable and found is not None else None


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
