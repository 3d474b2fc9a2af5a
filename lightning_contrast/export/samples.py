"""Images on which an exported file is compared with its network, and by which int8 is calibrated."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.augment import ViewPolicy
from lightning_contrast.augment.images import check_scaled_values
from lightning_contrast.callbacks.capture.dataloaders import like
from lightning_contrast.callbacks.capture.sampling import drawn_rows, is_map_style
from lightning_contrast.contracts import batch_labels, batch_texts, check_images, is_texts, split_batch
from lightning_contrast.export.source import pixel_spec

RANDOM_IMAGES = 16
"""Images of random pixels that are compared if no data are given."""


class Samples(NamedTuple):
    """Inputs of a network, in the order of the data.

    Attributes:
        inputs: ``(N, C, h, w)``, prepared as the network expects them; uint8 for a network with its preprocessing.
        labels: Classes ``(N,)``, or None.
        source: Where they come from, in words.
        texts: N texts, or tokens ``(N, L)``, of data that have them.
    """

    inputs: Tensor
    labels: Tensor | None
    source: str
    texts: list[str] | Tensor | None = None

    def split(self, count: int) -> tuple["Samples", "Samples"]:
        """Return ``count`` rows, drawn with a fixed seed, and all others."""
        order = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(0))
        return self._rows(order[:count].sort().values), self._rows(order[count:].sort().values)

    def _rows(self, rows: Tensor) -> "Samples":
        texts = self.texts
        if isinstance(texts, list):
            texts = [texts[row] for row in rows.tolist()]
        elif texts is not None:
            texts = texts[rows]
        labels = None if self.labels is None else self.labels[rows]
        source = self.source.replace(str(len(self.inputs)), str(len(rows)), 1)
        return Samples(self.inputs[rows], labels, source, texts)


def read_samples(data: Any, spec: Mapping[str, Any], *, channels: int, count: int, pixels: bool = False) -> Samples:
    """Return images of data, prepared for a network.

    Of a DataLoader whose rows are read by index they lie at equal distances in the set; of any other iterable they are
    the first ones.

    Args:
        data: A LightningDataModule, of which the validation images are read, or the training images if there are none;
            an iterable of batches by the batch contract; images ``(N, C, H, W)``; or None for random pixels.
        spec: The ``input_spec`` of the network.
        channels: Channels of the network's input.
        count: Largest number of images, >= 1.
        pixels: Return uint8 images of the network's size instead of normalized ones.

    Raises:
        TypeError: If the data are none of these.
        ValueError: If a batch holds views, its values are out of range, or there are no images.
    """
    indices = len(spec.get("indices", []))
    policy = ViewPolicy.from_input_spec(pixel_spec(spec) if pixels else spec, channels=channels - indices)
    if data is None:
        shape = (RANDOM_IMAGES, channels - indices, policy.height, policy.width)
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        if policy.scale is not None:
            images = images * (policy.scale[1] - policy.scale[0]) + policy.scale[0]
        return Samples(_prepared(images, policy, pixels), None, f"{RANDOM_IMAGES} images of random pixels")
    inputs, labels, texts, found = [], [], [], 0
    for batch in _batches(data, count):
        images = _images_of(batch, policy)[: count - found]
        inputs.append(_prepared(images, policy, pixels))
        known = batch_labels(batch)
        is_class = known is not None and known.ndim == 1 and not known.is_floating_point()
        labels.append(known[: len(images)].cpu() if known is not None and is_class else None)
        texts.append(_texts_of(batch, len(images)))
        found += len(images)
        if found == count:
            break
    require(found > 0, "data", "hold at least one image", 0, "Check the loader")
    classes = [part for part in labels if part is not None]
    return Samples(
        torch.cat(inputs),
        torch.cat(classes) if len(classes) == len(labels) else None,
        f"{found} images of {type(data).__name__}",
        _joined(texts),
    )


def _batches(data: Any, count: int) -> Iterable[Any]:
    """Return the batches of data, of which images in memory are one."""
    if isinstance(data, L.LightningDataModule):
        data.prepare_data()
        data.setup("fit")
        data = data.val_dataloader() if _overrides(data, "val_dataloader") else data.train_dataloader()
    if isinstance(data, Tensor):
        return (data,)
    if is_map_style(data):
        rows = drawn_rows(data)
        chosen = rows if len(rows) <= count else [rows[i * len(rows) // count] for i in range(count)]
        return like(data, chosen, drop_last=False)
    if not isinstance(data, Iterable) or isinstance(data, str):
        hint = "Give a DataModule, a loader without views, or images (N, C, H, W)"
        fail("data", "be a DataModule or a loader", type(data).__name__, hint, TypeError)
    return data


def _overrides(data: L.LightningDataModule, hook: str) -> bool:
    return getattr(getattr(data, hook), "__func__", None) is not getattr(L.LightningDataModule, hook)


def _images_of(batch: Any, policy: ViewPolicy) -> Tensor:
    images, _ = split_batch(batch)
    if not isinstance(images, Tensor):
        hint = "Give a loader without views, such as that of the validation"
        fail("data", "yield one tensor of images per batch", f"{len(images)} views", hint)
    if policy.scale is None:
        check_images(images, values=True, evaluating=True)
    else:
        check_scaled_values(images, policy.scale)
    return images


def _prepared(images: Tensor, policy: ViewPolicy, pixels: bool) -> Tensor:
    """Return images as a network expects them, or as uint8 images of its size."""
    found = policy.eval_transform(images).cpu()
    if not pixels:
        return found
    low, high = policy.scale or (0.0, 255.0)
    return (found * (high - low) + low).round().to(torch.uint8)


def _texts_of(batch: Any, count: int) -> list[str] | Tensor | None:
    second = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    has_texts = isinstance(batch, Mapping) and "text" in batch
    return batch_texts(batch, "export")[:count] if has_texts or is_texts(second) else None


def _joined(parts: list[list[str] | Tensor | None]) -> list[str] | Tensor | None:
    if any(part is None for part in parts):
        return None
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return [text for part in parts if isinstance(part, list) for text in part]
