"""How batches are turned into views: the one wrapper around the strategy's transfer, seeds, and value checks."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.contracts import IMAGE_KEY, Images, is_views, replace_images, split_batch

HOOK = "batch_to_device"
TOLERANCE = 1e-3
"""How far float images may leave 0..1: rounding in a lower precision, not another range."""


class Transfer:
    """Stands for a strategy's ``batch_to_device`` and runs transforms on what it gives.

    There is one for each strategy and it holds a list, so that several callbacks may come and go in any order.
    """

    def __init__(self, strategy: Any) -> None:
        self.inner = getattr(strategy, HOOK)
        self.own_attribute = HOOK in vars(strategy)
        self.transforms: list[Callable[[Any], Any]] = []

    def __call__(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch to the device, then transform it there."""
        batch = self.inner(batch, device=device, dataloader_idx=dataloader_idx)
        for transform in self.transforms:
            batch = transform(batch)
        return batch

    @classmethod
    def add(cls, strategy: Any, transform: Callable[[Any], Any], *, first: bool = False) -> None:
        """Run ``transform`` on every batch of the strategy, once however often it is added; last, or first of all."""
        current = vars(strategy).get(HOOK)
        if not isinstance(current, cls):
            current = cls(strategy)
            setattr(strategy, HOOK, current)
        if transform not in current.transforms:
            current.transforms.insert(0 if first else len(current.transforms), transform)

    @classmethod
    def remove(cls, strategy: Any, transform: Callable[[Any], Any]) -> None:
        """Stop running ``transform``, and leave the strategy as it was after the last one."""
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


def derived_seed(*parts: int) -> int:
    """Return a seed that is a function of all parts and of nothing else, equal on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: seeds are signed


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw torch's random numbers from ``seed`` inside, and leave the global generators as they were.

    Args:
        seed: None: draw from the global generators.
        device: Whose generator is seeded beside the CPU's.
    """
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def map_batches(batch: Any, transform: Callable[[Any], Any], loaders: Any = None) -> Any:
    """Transform a batch, or each batch of the collection that a `CombinedLoader` gives.

    Args:
        batch: A batch of the contract, or a list, tuple or dict of batches; None where a loader has run out.
        transform: Gets one batch of the contract.
        loaders: The loader that gave the batch, or the collection of loaders; None where it is not known, as in
            evaluation, and what the batch looks like has to tell.
    """
    if batch is None:
        return None
    many = _many(batch) if loaders is None else isinstance(loaders, Mapping | list | tuple)
    if not many:
        return transform(batch)
    if isinstance(batch, Mapping):
        return {key: map_batches(one, transform, loaders and loaders[key]) for key, one in batch.items()}
    of_each = loaders or [None] * len(batch)
    return type(batch)(map_batches(one, transform, of) for one, of in zip(batch, of_each, strict=True))


def _many(batch: Any) -> bool:
    """Tell a collection of batches from one batch."""
    if isinstance(batch, Mapping):
        items = [item for item in batch.values() if item is not None]
        return IMAGE_KEY not in batch and all(isinstance(item, Mapping | list | tuple) for item in items)
    if not isinstance(batch, list | tuple) or hasattr(batch, "_replace"):
        return False
    first = next((item for item in batch if item is not None), None)
    return isinstance(first, Mapping | list | tuple) and not is_views(first)


def transform_images(batch: Any, transform: Callable[[Tensor], Images], owner: str) -> Any:
    """Return the batch with its images transformed.

    Args:
        batch: A batch of the contract with a tensor of images.
        transform: Gets the images (B, C, H, W).
        owner: Name of the callback, for messages.

    Raises:
        TypeError: If the batch holds views already.
    """
    images, _ = split_batch(batch)
    if not isinstance(images, Tensor):
        mend = f"Remove {owner}, or the transform that makes views in the loader"
        fail("batch", "hold images (B, C, H, W)", f"a list of {len(images)} views", mend, TypeError)
    return replace_images(batch, transform(images))


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
    mend = "Yield a batch of images, or name them in a dict"
    require(images.ndim == 4, "images", "have the shape (B, C, H, W)", tuple(images.shape), mend)
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        mend = "Convert them in the dataset: `.to(torch.uint8)`, or a float in 0..1"
        fail("images", "be uint8 in 0..255 or float in 0..1", str(images.dtype), mend, TypeError)
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
        mend = "Divide by 255, or leave them as uint8"
    else:
        mend = "Remove Normalize from the dataset's transform: the policy normalises"
    if evaluating:
        mend += "; or set `evaluate=False`, which leaves validation, test and prediction batches as they are"
    fail("images", "lie in 0..1 where they are float", (low, high), mend)


def check_views(views: Any, images: Tensor) -> list[Tensor]:
    """Return what a policy made, as a list, or say what it should have been."""
    if not is_views(views) or not isinstance(views, Sequence):
        mend = "Return one tensor (B, C, h, w) for each view"
        fail("policy(images)", "be a list of views", type(views).__name__, mend, TypeError)
    sizes = [len(view) for view in views]
    mend = "Return every image in every view"
    require(set(sizes) == {len(images)}, "policy(images)", f"hold {len(images)} images in each view", sizes, mend)
    return list(views)
