"""Feature banks of the online k-NN: the newest training features, or features of a set that is encoded on demand."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import require
from lightning_contrast.callbacks.capture.dataloaders import like
from lightning_contrast.callbacks.capture.features import FeatureHook
from lightning_contrast.callbacks.capture.forward_pass import encode, extra_pass
from lightning_contrast.callbacks.capture.labels import Source
from lightning_contrast.callbacks.capture.sampling import SEED, is_map_style, share_of_rank
from lightning_contrast.distributed import gather, rank, world_size
from lightning_contrast.seeding import derived_seed, isolated

LabeledFeatures = tuple[Tensor, Tensor]
"""Features ``(N, F)``, float32, and their targets ``(N, ...)``."""


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


class EncodedRows(NamedTuple):
    """Features and targets of a batch of a set that was encoded, for one layer."""

    features: Tensor
    """``(B, F)``, float32."""
    targets: Tensor
    """Targets ``(B, ...)``."""
    valid: Tensor
    """``(B,)``, bool; False for rows that are left out of a bank."""


ReadRows: TypeAlias = Callable[[Tensor, Any, int], EncodedRows]
"""Gets the features ``(B, F)`` of a layer, the batch on the device, and the index of the layer."""


def gathered(batches: Sequence[EncodedRows], device: torch.device) -> LabeledFeatures | None:
    """Return the valid features ``(N, F)`` of all ranks and their targets ``(N, ...)``, or None if there are none.

    Args:
        batches: The batches of this rank.
        device: Device of the result, on which the process group communicates.
    """
    width = max([rows.features.shape[1] for rows in batches], default=0)
    features = [rows.features[rows.valid] for rows in batches] or [torch.zeros(0, width, device=device)]
    targets = [rows.targets[rows.valid] for rows in batches] or [torch.zeros(0, dtype=torch.int64, device=device)]
    own = torch.cat(features).to(device), torch.cat(targets).to(device)
    found, labels = gather(own[0].contiguous()), gather(own[1].contiguous())
    return (found, labels) if len(labels) else None


def encoded(
    trainer: Any,
    module: Any,
    hooks: Sequence[FeatureHook],
    loader: Any,
    read: ReadRows,
    *,
    limit: int,
    images: Source = None,
    equal: bool = True,
    evenly: bool = False,
) -> dict[str, list[EncodedRows]]:
    """Encode the images that a loader draws with the current weights in eval mode, for each hooked layer.

    Of a DataLoader over a dataset of known length, the rows that its sampler draws are read once each, in order, at
    most ``limit`` of them, as `share_of_rank` chooses. Any other loader is read in full by each rank, which keeps its
    share of the rows of each batch.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        hooks: The attached hooks of the layers.
        loader: Yields labeled batches.
        read: Reads features and targets, see `ReadRows`.
        limit: Maximum number of images over all ranks.
        images: Where the images of a batch are, see `find_images`.
        equal: Whether all ranks have the same loader, see `share_of_rank`.
        evenly: Choose rows at equal distances instead of by a fixed seed.

    Returns:
        The batches of this rank by layer.

    Raises:
        ValueError: If the loader is empty.
    """
    device = trainer.strategy.root_device
    share = share_of_rank(loader, limit, equal=equal, device=device, evenly=evenly) if is_map_style(loader) else None
    reads_batches = share is not None and loader.batch_size is None and loader.batch_sampler is None
    if share is not None:
        loader = like(loader, share.indices, drop_last=False)
    kept: dict[str, list[EncodedRows]] = {hook.features: [] for hook in hooks}
    rows = items = 0
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
                found, batch = encode(trainer, module, hooks, batch, images)
            number = len(found[0])
            items += 1 if reads_batches else number
            room = limit - rows
            if share is not None and items > share.rows:  # repetitions, so that all ranks make as many passes
                room = 0 if reads_batches else min(room, max(0, share.rows - (items - number)))
            own = slice(rank(), None, world_size()) if share is None else slice(None)
            for index, (hook, of_layer) in enumerate(zip(hooks, found, strict=True)):
                part = EncodedRows(*(value[own][:room] for value in read(of_layer, batch, index)))
                kept[hook.features].append(part)
            rows += len(kept[hooks[0].features][-1].valid)
            if share is None and rows * world_size() >= limit:
                break
    return kept
