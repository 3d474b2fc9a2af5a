"""Feature banks of the online k-NN: the newest training features, or features of a set that is encoded on demand."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from lightning_contrast._checks import require
from lightning_contrast.callbacks.capture.dataloaders import SEED, like
from lightning_contrast.callbacks.capture.features import FeatureHook
from lightning_contrast.callbacks.capture.forward_pass import encode, extra_pass
from lightning_contrast.distributed import gather, rank, world_size
from lightning_contrast.seeding import derived_seed, isolated

LabeledFeatures = tuple[Tensor, Tensor]
"""Features ``(N, F)``, L2-normalized, and their classes ``(N,)``."""


class FeatureBuffer:
    """The newest features of one rank, batch by batch, L2-normalized in half precision."""

    def __init__(self) -> None:
        self.batches: deque[LabeledFeatures] = deque()
        self.rows = 0

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Append a batch.

        Args:
            features: ``(B, F)``.
            labels: Classes ``(B,)``, -1 for rows that do not vote: removing them here would synchronize the device.
        """
        self.batches.append((F.normalize(features, dim=1).half(), labels))
        self.rows += len(labels)

    def trim(self, limit: int, batches: float) -> None:
        """Remove the oldest batches beyond ``limit`` rows or ``batches`` batches; the newest batch always stays."""
        while len(self.batches) > 1 and (self.rows > limit or len(self.batches) > batches):
            self.rows -= len(self.batches.popleft()[1])

    def clear(self) -> None:
        """Remove all batches."""
        self.batches.clear()
        self.rows = 0

    def gathered(self, device: torch.device) -> LabeledFeatures | None:
        """Return the labeled features of all ranks in float32, or None if there are none."""
        if self.batches:
            features = torch.cat([batch for batch, _ in self.batches])
            labels = torch.cat([batch for _, batch in self.batches])
            features, labels = features[labels >= 0], labels[labels >= 0]
        else:
            features, labels = torch.zeros(0, 0, dtype=torch.float16), torch.zeros(0, dtype=torch.int64)
        features, labels = gather(features.to(device)), gather(labels.to(device))
        return (F.normalize(features.float(), dim=1), labels) if len(labels) else None


class EvenSampler(Sampler[int]):
    """One rank's share of at most ``limit`` rows of a dataset, evenly spaced, in order.

    All ranks get the same number of rows, so that they make the same number of forward passes; the last row may
    therefore be padding, which ``rows`` does not count.

    Args:
        total: Rows of the dataset.
        limit: Maximum number of rows over all ranks.
    """

    def __init__(self, total: int, limit: int) -> None:
        count, processes = min(total, limit), world_size()
        positions = range(rank(), -(-count // processes) * processes, processes)
        self.rows = sum(position < count for position in positions)
        self.indices = [position % count * total // count for position in positions]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def can_share(loader: Any) -> bool:
    """Return whether `encoded` can divide a loader among the ranks: a DataLoader over a dataset of known length."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return type(loader.batch_sampler) is BatchSampler


def encoded(
    trainer: Any,
    module: Any,
    hooks: Sequence[FeatureHook],
    loader: Any,
    read: Callable[[Tensor, Any, int], tuple[Tensor, Tensor]],
    *,
    limit: int,
) -> dict[str, FeatureBuffer]:
    """Encode the images of a loader with the current weights, for each hooked layer.

    The dataset of an ordinary DataLoader is read once, in order, divided among the ranks. Any other loader is read in
    full by each rank, which keeps its share of the rows of each batch.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        hooks: The attached hooks of the layers.
        loader: Yields labeled batches.
        read: Gets the features ``(B, F)`` of a layer, the batch on the device and the index of the layer; returns
            features and classes, -1 for rows that do not vote.
        limit: Maximum number of images over all ranks.

    Returns:
        The features of this rank by layer.

    Raises:
        ValueError: If the loader is empty.
    """
    device = trainer.strategy.root_device
    sampler = EvenSampler(len(loader.dataset), limit) if can_share(loader) and len(loader.dataset) else None
    if sampler is not None:
        loader = like(loader, sampler, drop_last=False)
    kept = {hook.features: FeatureBuffer() for hook in hooks}
    with extra_pass(trainer, module, hooks):
        with isolated(derived_seed(SEED), device):
            batches = iter(loader)
        for batch_idx in range(limit):  # a batch has at least one image
            with isolated(derived_seed(SEED, batch_idx, rank()), device):
                batch = next(batches, None)
                if batch is None:
                    kind = type(loader).__name__
                    require(batch_idx > 0, "dataloader", "yield at least one batch", kind, "Check its dataset")
                    break
                found, batch = encode(trainer, module, hooks, batch)
            own = slice(rank(), None, world_size()) if sampler is None else slice(None)
            for index, (hook, of_layer) in enumerate(zip(hooks, found, strict=True)):
                features, labels = read(of_layer, batch, index)
                buffer = kept[hook.features]
                room = (limit if sampler is None else sampler.rows) - buffer.rows
                buffer.add(features[own][:room], labels[own][:room])
            if sampler is None and kept[hooks[0].features].rows * world_size() >= limit:
                break
    return kept
