"""Where the features that vote in the online k-NN come from: those seen in training, or encoded anew."""

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

Bank = tuple[Tensor, Tensor]
"""Features (N, F), float32, L2-normalised, and their classes (N,)."""


class Chunks:
    """The newest features of one rank, batch by batch, L2-normalised in half precision."""

    def __init__(self) -> None:
        self.batches: deque[Bank] = deque()
        self.rows = 0

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Keep features (B, F) with classes (B,), -1 where a row must not vote: to drop it here would cost a sync."""
        self.batches.append((F.normalize(features, dim=1).half(), labels))
        self.rows += len(labels)

    def forget(self, limit: int, batches: float) -> None:
        """Drop the oldest batches beyond ``limit`` rows or a number of batches; the newest batch stays."""
        while len(self.batches) > 1 and (self.rows > limit or len(self.batches) > batches):
            self.rows -= len(self.batches.popleft()[1])

    def clear(self) -> None:
        """Forget everything."""
        self.batches.clear()
        self.rows = 0

    def gathered(self, device: torch.device) -> Bank | None:
        """Return the labelled features of all ranks, or None where there are none."""
        if self.batches:
            features = torch.cat([chunk for chunk, _ in self.batches])
            labels = torch.cat([chunk for _, chunk in self.batches])
            features, labels = features[labels >= 0], labels[labels >= 0]
        else:
            features, labels = torch.zeros(0, 0, dtype=torch.float16), torch.zeros(0, dtype=torch.int64)
        features, labels = gather(features.to(device)), gather(labels.to(device))
        return (F.normalize(features.float(), dim=1), labels) if len(labels) else None


class EvenShare(Sampler[int]):
    """One rank's share of at most ``limit`` rows of a set, spread evenly over it, in order.

    All ranks get the same number of rows, so that they make the same number of forward passes: the last row may be one
    too many, see ``rows``.

    Args:
        total: Rows of the set.
        limit: Rows over all ranks, at most.
    """

    def __init__(self, total: int, limit: int) -> None:
        count, processes = min(total, limit), world_size()
        places = range(rank(), -(-count // processes) * processes, processes)
        self.rows = sum(place < count for place in places)
        self.indices = [place % count * total // count for place in places]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def can_share(loader: Any) -> bool:
    """Tell whether `encoded` can read a loader's set in its own order: a DataLoader over a set of known length."""
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
) -> dict[str, Chunks]:
    """Return the features of a loader's images as the module gives them now, for each tapped layer.

    The set of an ordinary DataLoader is read once, in order, divided among the ranks. Any other loader is read on each
    rank as it is, and of each batch a rank keeps its share of the rows.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        hooks: The attached hooks of the layers.
        loader: Yields labelled batches.
        read: Gets the features of a layer, the batch on the device and the number of the layer; returns features and
            classes, -1 for rows that must not vote.
        limit: Images over all ranks, at most.

    Raises:
        ValueError: If the loader is empty.
    """
    device = trainer.strategy.root_device
    share = EvenShare(len(loader.dataset), limit) if can_share(loader) and len(loader.dataset) else None
    if share is not None:
        loader = like(loader, share, drop_last=False)
    kept = {tap.features: Chunks() for tap in hooks}
    with extra_pass(trainer, module, hooks):
        with isolated(derived_seed(SEED), device):
            batches = iter(loader)
        for place in range(limit):  # a batch has an image or more
            with isolated(derived_seed(SEED, place, rank()), device):
                batch = next(batches, None)
                if batch is None:
                    hint = "Look at its dataset"
                    require(place > 0, "bank", "yield at least one batch", type(loader).__name__, hint)
                    break
                found, batch = encode(trainer, module, hooks, batch)
            own = slice(rank(), None, world_size()) if share is None else slice(None)
            for number, (tap, of_layer) in enumerate(zip(hooks, found, strict=True)):
                features, labels = read(of_layer, batch, number)
                chunks = kept[tap.features]
                room = (limit if share is None else share.rows) - chunks.rows
                chunks.add(features[own][:room], labels[own][:room])
            if share is None and kept[hooks[0].features].rows * world_size() >= limit:
                break
    return kept
