"""The interface between batches, methods and callbacks.

A loader yields ``images``, ``(images, labels, ...)``, a dict with ``"image"`` and ``"label"``, or a dataclass with
fields of those names. ``images`` is a tensor ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1; or any other tensor
whose first dimension is the batch, such as clips ``(B, C, T, H, W)`` or series ``(B, C, T)``, for a network and a
policy that take it. After `ViewAugmentation` the same container holds a list of V view tensors ``(B, C, h, w)``
instead of ``images``. In a dict with other keys, the images are its only 4-D tensor or list of views; callbacks also
take the place of the images as ``images=``, see `split_batch`. ``(images, texts)`` has no labels: with texts, labels
and indices need a dict or a dataclass, whose texts are ``"text"``.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_contrast._checks import check_batch, fail, require

__all__ = [
    "IMAGE_KEY",
    "INDEX_KEY",
    "LABEL_KEY",
    "TEXT_KEY",
    "TOLERANCE",
    "ImageSource",
    "Images",
    "batch_indices",
    "batch_labels",
    "batch_texts",
    "check_images",
    "check_views",
    "is_texts",
    "is_views",
    "replace_images",
    "require_indices",
    "require_labels",
    "require_views",
    "split_batch",
]

TOLERANCE = 1e-3
"""How far float images may lie outside 0..1; allows for rounding in a lower precision."""

Images: TypeAlias = Tensor | list[Tensor]
ImageSource: TypeAlias = str | int | Callable[[Any], Any] | None
"""Where the images of a batch are, see `split_batch`."""

IMAGE_KEY, LABEL_KEY, INDEX_KEY, TEXT_KEY = "image", "label", "index", "text"


def is_views(value: object) -> bool:
    """Return whether ``value`` is a non-empty list or tuple of view tensors ``(B, ...)`` of one number of dimensions.

    Args:
        value: The images entry of a batch, of any type.
    """
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence) or len(value) == 0:
        return False
    if not all(isinstance(item, Tensor) and item.ndim >= 2 and item.ndim == value[0].ndim for item in value):
        return False
    return value[0].ndim > 2 or all(item.shape == value[0].shape for item in value)  # (B, D): no labels (B, K)


def _is_bare_views(batch: Sequence[object]) -> bool:
    """Return whether a batch is a list of two or more floating tensors of equal (B, C), not (images, labels)."""
    if len(batch) < 2 or not is_views(batch):
        return False
    tensors = cast("Sequence[Tensor]", batch)
    return all(t.ndim > 2 and t.is_floating_point() and t.shape[:2] == tensors[0].shape[:2] for t in tensors)


def _field(batch: object, key: str) -> str | None:
    """Return the name of the dataclass field for ``key`` (``image`` or ``images``), or None."""
    names = {field.name for field in dataclasses.fields(cast("Any", batch))}
    return next((name for name in (key, key + "s") if name in names), None)


def _is_record(batch: object) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _as_images(value: object) -> Images:
    """Return a tensor unchanged, and a sequence of view tensors as a list."""
    if isinstance(value, Tensor):
        return value
    if is_views(value):
        return list(cast("Sequence[Tensor]", value))
    fail("batch", "hold images (B, C, H, W) or a list of views", type(value).__name__, _LAYOUTS, TypeError)


_LAYOUTS = (
    'Yield images, (images, labels), or a dict or dataclass with "image" and "label"; convert other batches in the '
    "collate function"
)


def split_batch(batch: Any, images: ImageSource = None) -> tuple[Images, Tensor | None]:
    """Split a batch into its images or views and its labels.

    Args:
        batch: Images ``(B, C, H, W)``; a list of views ``(B, C, h, w)``; ``(images or views, labels, ...)``; a dict
            with ``"image"`` and optionally ``"label"``; or a dataclass with such fields. A tuple equals a list.
        images: Where the images are: the key of a dict, the index into a tuple or list, or a function of the batch.
            None: as above; in a dict without ``"image"``, its only 4-D tensor or list of views.

    Returns:
        The images or the list of views, and the labels ``(B,)`` or None, see `batch_labels`.

    Raises:
        TypeError: If the batch has none of these layouts.
    """
    return _as_images(_find_images(batch, images)), batch_labels(batch)


def _find_images(batch: Any, images: ImageSource) -> Any:
    """Return the images of a batch as they are in it."""
    if images is None:
        return _images_entry(batch)
    if callable(images):
        return images(batch)
    try:
        return batch[images]
    except (KeyError, IndexError, TypeError):
        keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        hint = "Name a key of the batch, an index into it, or a function that finds them"
        fail("images", f"lead to images of the batch ({images!r} does not)", keys, hint, TypeError)


def _images_entry(batch: Any) -> Any:
    """Return the images of a batch as the contract has them."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return batch[_image_key(batch)]
    if _is_record(batch):
        name = _field(batch, IMAGE_KEY)
        if name is None:
            fail("batch", f"have the field {IMAGE_KEY!r}", type(batch).__name__, _LAYOUTS, TypeError)
        return getattr(batch, name)
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 0:
        return batch if _is_bare_views(batch) else batch[0]
    fail("batch", "hold images", type(batch).__name__, _LAYOUTS, TypeError)


def _image_key(batch: Mapping[Any, Any]) -> Any:
    if IMAGE_KEY in batch:
        return IMAGE_KEY
    found = [key for key, value in batch.items() if is_views(value) or (isinstance(value, Tensor) and value.ndim == 4)]
    if len(found) != 1:
        rule = f"have the key {IMAGE_KEY!r}, or one 4-D tensor or list of views"
        fail("batch", rule, sorted(map(str, batch)), f"{_LAYOUTS}, or give `images=` to the callback", TypeError)
    return found[0]


def batch_labels(batch: Any, *, rows: bool = False) -> Tensor | None:
    """Return the labels of a batch, or None if there are none.

    Args:
        batch: A dict or dataclass with ``"label"``, or a sequence whose second item is the labels, ``(B,)``, or floats
            ``(B, K)``. Texts are no labels: a list of str, or 2-D integers, which are tokens ``(B, L)``.
        rows: Take 2-D integers for labels ``(B, K)``, several per image, and not for tokens.
    """
    found = _entry(batch, LABEL_KEY, 1, rows=rows)
    return found if isinstance(found, Tensor) else None


def _entry(batch: Any, key: str, place: int, *, rows: bool = False) -> Any:
    """Return an item of a dict, a dataclass or a sequence ``(images, labels, indices, ...)``, or None; never texts."""
    if isinstance(batch, Mapping):
        return batch.get(key)
    if _is_record(batch):
        name = _field(batch, key)
        return getattr(batch, name) if name else None
    if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) <= place or _is_bare_views(batch):
        return None
    texts = any(is_texts(item) and not (rows and isinstance(item, Tensor)) for item in batch[1 : place + 1])
    return None if texts else batch[place]


def require_views(batch: Any, count: int, minimum: int = 2) -> list[Tensor]:
    """Return the views of a training batch after checking their number and sizes.

    Args:
        batch: A batch whose images are a list of views, each ``(B, C, h, w)``; a single view may be a tensor.
        count: Number of views that the method takes.
        minimum: Smallest batch size, >= 1; use 1 if the batches of all ranks are joined.

    Returns:
        The views, each ``(B, C, h, w)`` with ``B >= minimum``.

    Raises:
        ValueError: If the batch holds a single tensor of images, a different number of views, views of unequal batch
            sizes, or fewer than ``minimum`` images.
    """
    images, _ = split_batch(batch)
    if isinstance(images, Tensor) and count == 1 and images.is_floating_point():
        images = [images]
    if isinstance(images, Tensor):
        hint = "Add `ViewAugmentation(...)` to the Trainer's callbacks, or yield a list of views from the loader"
        what = f"one {str(images.dtype).removeprefix('torch.')} tensor of shape {tuple(images.shape)}"
        fail("batch", f"hold a list of {count} views", what, hint)
    hint = f"Give a policy that makes {count} views"
    require(len(images) == count, "batch", f"hold {count} views", len(images), hint)
    sizes = [len(view) for view in images]
    require(len(set(sizes)) == 1, "views", "have equal batch sizes", sizes, "Make all views of the same images")
    check_batch("views", sizes[0], minimum)
    return images


def batch_indices(batch: Any) -> Tensor | None:
    """Return the sample indices ``(B,)`` of a batch, or None if the loader does not provide them.

    Args:
        batch: A dict or dataclass with ``"index"``, or a sequence whose third item is the indices; one whose second
            item is texts has none.
    """
    found = _entry(batch, INDEX_KEY, 2)
    return found if isinstance(found, Tensor) else None


def batch_texts(batch: Any, method: str) -> list[str] | Tensor:
    """Return the texts of a batch: a list of B str, or int64 tokens ``(B, L)``.

    Args:
        batch: A dict or dataclass with ``"text"``; or a sequence with images first, whose first later item that is a
            list of str or a 2-D integer tensor is taken.
        method: Name of the method that needs them, for the error message.

    Raises:
        ValueError: If the batch has no texts.
        TypeError: If they are neither str nor integer tokens ``(B, L)``.
    """
    if isinstance(batch, Mapping) or _is_record(batch):
        found = _entry(batch, TEXT_KEY, 1)
    else:
        items = batch[1:] if isinstance(batch, Sequence) and not isinstance(batch, str) else ()
        found = next((item for item in items if is_texts(item)), None)
    hint = 'Yield (images, texts) or a dict with "image" and "text"; texts are a list of str or int64 tokens (B, L)'
    if found is None:
        fail("batch", f"hold texts for {method}", "none", hint)
    if not is_texts(found):
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        fail("texts", "be a list of str or int64 tokens (B, L)", what, hint, TypeError)
    return found if isinstance(found, Tensor) else list(found)


def is_texts(value: object) -> bool:
    """Return whether a value is the texts of a batch: a list of B str, or integer tokens ``(B, L)``.

    Args:
        value: An item of a batch, of any type.
    """
    if isinstance(value, Tensor):
        return value.ndim == 2 and value.dtype in (torch.int32, torch.int64)
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(text, str) for text in value)


def replace_images(batch: Any, images: Images, source: ImageSource = None) -> Any:
    """Return a copy of the batch with its images replaced; the original batch is not modified.

    Args:
        batch: Any batch that `split_batch` takes.
        images: The new images ``(B, C, H, W)``, or a list of views ``(B, C, h, w)``.
        source: See ``images`` of `split_batch`. What a function returns must be part of the batch.

    Returns:
        A batch of the same type.

    Raises:
        ValueError: If ``source`` is a function whose result is not part of the batch.
    """
    if callable(source):
        return _replaced(batch, source(batch), images)
    if isinstance(batch, Tensor) or (source is None and isinstance(batch, Sequence) and _is_bare_views(batch)):
        return images
    if isinstance(batch, Mapping):
        copied = dict(batch) if type(batch) is dict else cast("Any", batch).copy()
        copied[_image_key(batch) if source is None else source] = images
        return copied
    if _is_record(batch):
        return dataclasses.replace(batch, **{cast("str", _field(batch, IMAGE_KEY)): images})
    place = range(len(batch))[int(source or 0)]
    if hasattr(batch, "_replace"):  # a NamedTuple: its constructor takes the fields as arguments
        return batch._replace(**{batch._fields[place]: images})
    return type(batch)([*batch[:place], images, *batch[place + 1 :]])


def _replaced(batch: Any, old: Any, new: Images) -> Any:
    """Return the batch with an object somewhere in it replaced."""
    found: list[bool] = []

    def swap(item: Any) -> Any:
        found.append(item is old)
        return new if item is old else item

    swapped = tree_map(swap, batch, is_leaf=lambda item: item is old)
    hint = "Return a tensor or a list of views of the batch itself, which the new views replace"
    require(any(found), "images", "be a function that returns a part of the batch", type(old).__name__, hint)
    return swapped


def check_images(images: Tensor, *, values: bool, evaluating: bool) -> Tensor:
    """Return images as uint8 or float32 after checking shape, dtype and range.

    Args:
        images: (B, C, H, W), uint8 in 0..255 or float in 0..1.
        values: Also check the values, which synchronizes with an accelerator.
        evaluating: Whether this is a validation, test or prediction batch; used in the error message.

    Returns:
        The images, (B, C, H, W); other float types are converted to float32.

    Raises:
        TypeError: If the dtype is neither uint8 nor float.
        ValueError: If the shape is not 4-D, or a value is NaN or outside 0..1.
    """
    hint = "Yield a batch of images, or name them in a dict"
    require(images.ndim == 4, "images", "have the shape (B, C, H, W)", tuple(images.shape), hint)
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        hint = "Convert them in the dataset: `.to(torch.uint8)`, or a float in 0..1; or give the policy a `scale`"
        fail("images", "be uint8 in 0..255 or float in 0..1", str(images.dtype), hint, TypeError)
    images = images.float()
    if values and images.numel() > 0:
        low, high = (float(bound) for bound in torch.aminmax(images))
        if math.isnan(low) or math.isnan(high):
            fail("images", "be finite", "NaN", "Check the files and the transform of the dataset")
        _check_range(low, high, evaluating)
    return images


def _check_range(low: float, high: float, evaluating: bool) -> None:
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return
    if low >= 0 and high <= 255:
        hint = "Divide by 255, or leave them as uint8"
    else:
        hint = "Remove Normalize from the dataset's transform: the policy normalizes; or give it the values' `scale`"
    if evaluating:
        hint += "; or set `evaluate=False`, which leaves validation, test and prediction batches unchanged"
    fail("images", "lie in 0..1 where they are float", (low, high), hint)


def check_views(views: Any, images: Tensor) -> list[Tensor]:
    """Return the output of a policy as a list after checking it.

    Args:
        views: Output of ``policy(images)``: a sequence of tensors ``(B, ...)``, or one tensor as the only view.
        images: Images that the policy was applied to, ``(B, ...)``.

    Raises:
        TypeError: If ``views`` is neither.
        ValueError: If a view has another batch size than ``images``.
    """
    views = [views] if isinstance(views, Tensor) else views
    if not isinstance(views, Sequence) or len(views) == 0 or not all(isinstance(v, Tensor) and v.ndim for v in views):
        hint = "Return one tensor (B, C, h, w) for each view"
        fail("policy(images)", "be a list of views", type(views).__name__, hint, TypeError)
    sizes = [len(view) for view in views]
    hint = "Return every image in every view"
    require(set(sizes) == {len(images)}, "policy(images)", f"hold {len(images)} images in each view", sizes, hint)
    return list(views)


def require_labels(batch: Any, method: str) -> Tensor:
    """Return the labels ``(B,)`` of a batch.

    Args:
        batch: A training batch.
        method: Name of the method that needs them, for the error message.

    Raises:
        ValueError: If the batch has none.
    """
    labels = batch_labels(batch)
    if labels is None:
        fail("batch", f"hold labels for {method}", "none", 'Yield (images, labels) or a dict with "label"')
    return labels


def require_indices(batch: Any, method: str) -> Tensor:
    """Return the sample indices ``(B,)`` of a batch.

    Args:
        batch: A training batch.
        method: Name of the method that needs them, for the error message.

    Raises:
        ValueError: If the batch has none.
    """
    indices = batch_indices(batch)
    if indices is None:
        hint = 'Set `indices=True` on the data module, or yield (images, labels, indices) or a dict with "index"'
        fail("batch", f"hold sample indices for {method}", "none", hint)
    return indices
