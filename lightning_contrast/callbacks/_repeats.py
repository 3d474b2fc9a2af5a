"""Images that a sampler gives a second time, so that all ranks evaluate equally many of them."""

from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler
from torch.utils.data.distributed import DistributedSampler

# Row i of rank r is place i * ranks + r of an order, after whose end the first ones come again. Subclasses may differ.
_SAMPLERS = (DistributedSampler, DistributedSamplerWrapper)


class Repeats:
    """Tells which rows of a rank's evaluation batches would be counted twice.

    Where a set does not divide by the ranks, the sampler that Lightning puts into a loader, and that of this package's
    data modules, give some images to two ranks. Other samplers are taken to repeat nothing.

    Args:
        loaders: The Trainer's loaders of an evaluation: one, or several in any container.
    """

    def __init__(self, loaders: Any) -> None:
        self._samplers = [_sampler(loader) for loader in tree_leaves(loaders)]
        self._rows = [0] * len(self._samplers)

    def first_time(self, loader: int, rows: int) -> Tensor | None:
        """Return which of the next ``rows`` rows of a loader count, (rows,) bool; None where all do.

        Args:
            loader: Number of the loader.
            rows: Images in its next batch.
        """
        sampler = self._samplers[loader] if loader < len(self._samplers) else None
        if sampler is None:
            return None
        start = self._rows[loader]
        self._rows[loader] += rows
        total = len(sampler.dataset)  # type: ignore[arg-type]  # a set that is sampled has a length
        if (start + rows - 1) * sampler.num_replicas + sampler.rank < total:
            return None
        return torch.arange(start, start + rows) * sampler.num_replicas + sampler.rank < total


def _sampler(loader: Any) -> DistributedSampler[Any] | None:
    """Return the sampler of a loader, where it is one whose order is known."""
    batches = getattr(loader, "batch_sampler", None)
    sampler = batches.sampler if type(batches) is BatchSampler else None
    deals_in_turn = type(sampler) in _SAMPLERS or getattr(sampler, "deals_in_turn", False)
    return sampler if deals_in_turn and isinstance(sampler, DistributedSampler) else None
