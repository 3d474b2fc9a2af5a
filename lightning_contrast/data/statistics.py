"""The mean and standard deviation of a domain's pixels."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_contrast._checks import fail, require
from lightning_contrast.contracts import split_batch

_CHUNK = 32  # images turned to float64 at a time


def estimate_mean_std(datamodule: L.LightningDataModule) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel over all pixels of the training images.

    The deviation is that of the pooled pixels (biased, divided by their number), not the mean of the images' own. Each
    training image counts once, also those that a short last batch would leave out; no random number is drawn. Every
    process goes through the whole set and finds the same values.

    Args:
        datamodule: Any data module whose training batches hold images ``(B, C, H, W)``, uint8 or float in 0..1. A
            loader that is no DataLoader over a map-style set is taken as it comes.

    Returns:
        The means and the deviations, C numbers each, on the scale 0..1: as the policies take them.

    Raises:
        TypeError: If the batches hold views, or images of another type.
        ValueError: If there are no images, or floats outside 0..1.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    count, mean, squares = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for batch in _in_order(datamodule.train_dataloader()):
        images, _ = split_batch(batch)
        if not isinstance(images, Tensor):
            fail("datamodule", "yield images", "views", "Leave the augmentation to `ViewAugmentation`", TypeError)
        for start in range(0, len(images), _CHUNK):
            pixels = _unit_pixels(images[start : start + _CHUNK])
            more, chunk_mean = pixels.shape[1], pixels.mean(dim=1)
            chunk_squares = (pixels - chunk_mean[:, None]).square().sum(dim=1)
            if count == 0:
                count, mean, squares = more, chunk_mean, chunk_squares
                continue
            # Chan et al., 1979: two groups pooled without the cancellation of E[x^2] - E[x]^2.
            delta, total = chunk_mean - mean, count + more
            mean = mean + delta * (more / total)
            squares = squares + chunk_squares + delta.square() * (count * more / total)
            count = total
    require(count > 0, "datamodule", "yield at least one training image", 0, "Look at its training set")
    return tuple(mean.tolist()), tuple((squares / count).sqrt().tolist())


def _unit_pixels(images: Tensor) -> Tensor:
    """Return ``(C, B * H * W)`` float64 in 0..1."""
    if images.dtype != torch.uint8 and not images.is_floating_point():
        fail("datamodule", "yield uint8 or float images", images.dtype, "Convert them in the data set", TypeError)
    pixels = images.to(torch.float64).transpose(0, 1).flatten(1)
    if images.dtype == torch.uint8:
        return pixels / 255
    low, high = pixels.min().item(), pixels.max().item()
    ok = 0 <= low <= high <= 1
    require(ok, "datamodule", "yield floats in 0..1", (low, high), "Normalise in the views, not in the data set")
    return pixels


def _in_order(loader: Any) -> Iterable[Any]:
    """Return a loader that gives each image of the set once, in order."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader  # type: ignore[no-any-return]  # any iterable of batches
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),
    )
