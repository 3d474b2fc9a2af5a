"""Channel mean and standard deviation of a training set."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_contrast._checks import fail, require
from lightning_contrast.contracts import split_batch

_CHUNK = 32  # images converted to float64 at a time


def estimate_mean_std(datamodule: L.LightningDataModule) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel over all pixels of the training images.

    The standard deviation is that of all pooled pixels (biased), not the mean over images. Each training image counts
    once, including those of a dropped last batch; no random numbers are drawn. Every process reads the whole dataset
    and returns the same values.

    Args:
        datamodule: Any data module whose training batches hold images ``(B, C, H, W)``, uint8 or float in 0..1. Loaders
            other than a DataLoader with a map-style dataset are iterated as they are.

    Returns:
        The means and the standard deviations, C numbers each, for pixels in 0..1, as for the policies.

    Raises:
        TypeError: If the batches hold views, or images of another dtype.
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
            # Pooled variance (Chan et al., 1979), without the cancellation of E[x^2] - E[x]^2.
            delta, total = chunk_mean - mean, count + more
            mean = mean + delta * (more / total)
            squares = squares + chunk_squares + delta.square() * (count * more / total)
            count = total
    require(count > 0, "datamodule", "yield at least one training image", 0, "Check its training set")
    return tuple(mean.tolist()), tuple((squares / count).sqrt().tolist())


def _unit_pixels(images: Tensor) -> Tensor:
    """Return ``(C, B * H * W)`` float64 in 0..1."""
    if images.dtype != torch.uint8 and not images.is_floating_point():
        fail("datamodule", "yield uint8 or float images", images.dtype, "Convert them in the dataset", TypeError)
    pixels = images.to(torch.float64).transpose(0, 1).flatten(1)
    if images.dtype == torch.uint8:
        return pixels / 255
    low, high = pixels.min().item(), pixels.max().item()
    ok = 0 <= low <= high <= 1
    require(ok, "datamodule", "yield floats in 0..1", (low, high), "Normalize the views, not the dataset")
    return pixels


def _in_order(loader: Any) -> Iterable[Any]:
    """Return a loader that yields each image of the dataset once, in order."""
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
