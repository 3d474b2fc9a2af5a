"""What a method, a batch and a callback may ask of each other.

A loader yields ``images``, ``(images, labels, ...)``, a dict with ``"image"`` and ``"label"``, or a dataclass with
fields of those names. ``images`` is a tensor ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1. After
`ViewAugmentation` the same container holds, in the place of ``images``, a list of V view tensors ``(B, C, h, w)``.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_batch, fail, require

TOLERANCE = 1e-3
"""How far float images may leave 0..1: rounding in a lower precision, not another range."""


Images: TypeAlias = Tensor | list[Tensor]

IMAGE_KEY, LABEL_KEY, INDEX_KEY = "image", "label", "index"


@runtime_checkable
class HasMomentumPairs(Protocol):
    """A module with networks that follow others: moved by `MomentumUpdate` only."""

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return ``[(online_module, momentum_module), ...]``."""
        ...


@runtime_checkable
class HasQueues(Protocol):
    """A module that holds queues of past embeddings: fed by `QueueUpdate` only."""

    def queues(self) -> dict[str, nn.Module]:
        """Return the queues by the name of the step output that feeds them."""
        ...


@runtime_checkable
class HasStepStates(Protocol):
    """A module with state that moves once per optimizer step: committed by `MomentumUpdate` only."""

    def step_states(self) -> list[nn.Module]:
        """Return modules with ``commit()`` and ``discard()``."""
        ...


def is_views(value: object) -> bool:
    """Tell whether ``value`` is a list (or tuple) of view tensors.

    Args:
        value: Anything that stands in the place of the images of a batch.
    """
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence) or len(value) == 0:
        return False
    return all(isinstance(item, Tensor) and item.ndim == 4 for item in value)


def _is_bare_views(batch: Sequence[object]) -> bool:
    """Tell a sequence of two or more floating 4-D tensors of equal (B, C) from ``(images, labels)``."""
    if len(batch) < 2 or not is_views(batch):
        return False
    tensors = cast("Sequence[Tensor]", batch)
    return all(t.is_floating_point() and t.shape[:2] == tensors[0].shape[:2] for t in tensors)


def _field(batch: object, key: str) -> str | None:
    """Return the name of the dataclass field that plays ``key`` (``image`` or ``images``), if there is one."""
    names = {field.name for field in dataclasses.fields(cast("Any", batch))}
    return next((name for name in (key, key + "s") if name in names), None)


def _is_record(batch: object) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _as_images(value: object) -> Images:
    """Return a tensor as it is and a sequence of tensors as a list."""
    if isinstance(value, Tensor):
        return value
    if is_views(value):
        return list(cast("Sequence[Tensor]", value))
    fail("batch", "hold images (B, C, H, W) or a list of views", type(value).__name__, _LAYOUTS, TypeError)


_LAYOUTS = (
    'Yield images, (images, labels), or a dict or dataclass with "image" and "label"; where it holds something else, '
    "convert it in the collate function"
)


def split_batch(batch: Any) -> tuple[Images, Tensor | None]:
    """Split a batch into its images or views and its labels.

    Args:
        batch: Images ``(B, C, H, W)``; a list of views; ``(images or views, labels, ...)``; a dict with ``"image"``
            and maybe ``"label"``; or a dataclass with such fields. A list and a tuple mean the same.

    Returns:
        The images, or the list of views, and the labels or None.

    Raises:
        TypeError: If there are no images where the contract puts them.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        if IMAGE_KEY not in batch:
            fail("batch", f"have the key {IMAGE_KEY!r}", sorted(map(str, batch)), _LAYOUTS, TypeError)
        labels = batch.get(LABEL_KEY)
        return _as_images(batch[IMAGE_KEY]), labels if isinstance(labels, Tensor) else None
    if _is_record(batch):
        name, label_name = _field(batch, IMAGE_KEY), _field(batch, LABEL_KEY)
        if name is None:
            fail("batch", f"have the field {IMAGE_KEY!r}", type(batch).__name__, _LAYOUTS, TypeError)
        labels = getattr(batch, label_name) if label_name else None
        return _as_images(getattr(batch, name)), labels if isinstance(labels, Tensor) else None
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 0:
        if _is_bare_views(batch):
            return list(batch), None
        labels = batch[1] if len(batch) > 1 else None
        return _as_images(batch[0]), labels if isinstance(labels, Tensor) else None
    fail("batch", "hold images", type(batch).__name__, _LAYOUTS, TypeError)


def require_views(batch: Any, count: int, minimum: int = 2) -> list[Tensor]:
    """Return the views of a training batch, or say what is wrong with it.

    Args:
        batch: A batch whose images are a list of views, each ``(B, C, h, w)``.
        count: How many views the method takes.
        minimum: Images that there must be, >= 1; 1 is right on each of several ranks, whose images count together.

    Returns:
        The views; they have equal batch sizes of at least ``minimum``.

    Raises:
        ValueError: If the batch holds one tensor of images, another number of views, views of unequal batch sizes,
            or views of too few images.
    """
    images, _ = split_batch(batch)
    if isinstance(images, Tensor):
        hint = "Add `ViewAugmentation(...)` to the Trainer's callbacks, or let the loader yield a list of views"
        fail("batch", f"hold a list of {count} views", f"one tensor of shape {tuple(images.shape)}", hint)
    require(
        len(images) == count, "batch", f"hold {count} views", len(images), f"Give a policy that makes {count} views"
    )
    sizes = [len(view) for view in images]
    require(len(set(sizes)) == 1, "views", "have equal batch sizes", sizes, "Make all views of the same images")
    check_batch("views", sizes[0], minimum)
    return images


def batch_indices(batch: Any) -> Tensor | None:
    """Return the sample indices ``(B,)`` of a batch, or None where the loader gives none.

    Args:
        batch: A dict or dataclass with ``"index"``, or a sequence whose third item is the indices.
    """
    if isinstance(batch, Mapping):
        found = batch.get(INDEX_KEY)
    elif _is_record(batch):
        found = getattr(batch, INDEX_KEY, None)
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 2 and not _is_bare_views(batch):
        found = batch[2]
    else:
        found = None
    return found if isinstance(found, Tensor) else None


def replace_images(batch: Any, images: Images) -> Any:
    """Return the batch with other images in their place: the same container, nothing written into the old one.

    Args:
        batch: Any batch that `split_batch` takes.
        images: What stands in the place of the images: a tensor, or a list of views.
    """
    if isinstance(batch, Tensor) or (isinstance(batch, Sequence) and _is_bare_views(batch)):
        return images
    if isinstance(batch, Mapping):
        copied = dict(batch) if type(batch) is dict else cast("Any", batch).copy()
        copied[IMAGE_KEY] = images
        return copied
    if _is_record(batch):
        return dataclasses.replace(batch, **{cast("str", _field(batch, IMAGE_KEY)): images})
    if hasattr(batch, "_replace"):  # a NamedTuple, whose constructor takes its fields one by one
        return batch._replace(**{batch._fields[0]: images})
    return type(batch)([images, *batch[1:]])


def check_images(images: Tensor, *, values: bool, evaluating: bool) -> Tensor:
    """Return images as float or uint8, or say what is wrong with them.

    Args:
        images: (B, C, H, W), uint8 in 0..255 or float in 0..1.
        values: Read the values too, which costs a synchronisation on an accelerator.
        evaluating: The batch is one of validation, test or prediction.

    Returns:
        The images; a float type other than float32 becomes float32, in which policies compute.

    Raises:
        TypeError: If they are neither uint8 nor float.
        ValueError: If they are not 4-D, NaN, or outside 0..1.
    """
    hint = "Yield a batch of images, or name them in a dict"
    require(images.ndim == 4, "images", "have the shape (B, C, H, W)", tuple(images.shape), hint)
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        hint = "Convert them in the dataset: `.to(torch.uint8)`, or a float in 0..1"
        fail("images", "be uint8 in 0..255 or float in 0..1", str(images.dtype), hint, TypeError)
    images = images.float()
    if values and images.numel() > 0:
        low, high = (float(bound) for bound in torch.aminmax(images))
        if math.isnan(low) or math.isnan(high):
            fail("images", "be finite", "NaN", "Look at the files and the transform of the dataset")
        _check_range(low, high, evaluating)
    return images


def _check_range(low: float, high: float, evaluating: bool) -> None:
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return
    if low >= 0 and high <= 255:
        hint = "Divide by 255, or leave them as uint8"
    else:
        hint = "Remove Normalize from the dataset's transform: the policy normalises"
    if evaluating:
        hint += "; or set `evaluate=False`, which leaves validation, test and prediction batches as they are"
    fail("images", "lie in 0..1 where they are float", (low, high), hint)


def check_views(views: Any, images: Tensor) -> list[Tensor]:
    """Return what a policy made, as a list, or say what it should have been."""
    if not is_views(views) or not isinstance(views, Sequence):
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
        method: Name of the method that needs them.

    Raises:
        ValueError: If there are none.
    """
    _, labels = split_batch(batch)
    if labels is None:
        hint = 'Yield (images, labels) or a dict with "label" from the loader'
        fail("batch", f"hold labels for {method}", "none", hint)
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
        hint = 'Set `indices=True` on the data module, or yield (images, labels, indices) or a dict with "index"'
        fail("batch", f"hold sample indices for {method}", "none", hint)
    return indices
