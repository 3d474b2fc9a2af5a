"""What a loader draws from its dataset: read from its sampler, without changing the state of the run."""

import copy
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_contrast.distributed import batch_sizes, rank, world_size
from lightning_contrast.seeding import derived_seed, isolated

SEED = 7
"""Seed of draws that must not come from the run's generators."""

MAX_DRAWS = 2**24
"""Draws that are read from a sampler without a length."""

# Row i of rank r is position i * ranks + r of an order, which is padded with its first rows. Subclasses may differ.
_DEALING = (DistributedSampler, DistributedSamplerWrapper)


def is_map_style(loader: Any) -> bool:
    """Return whether a loader is a DataLoader over a dataset of known length, whose rows can be read by index."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def dealing_sampler(loader: Any) -> DistributedSampler[Any] | None:
    """Return the sampler of a loader if it deals the rows of an order to the ranks in turn, else None."""
    batches = getattr(loader, "batch_sampler", None)
    sampler = batches.sampler if type(batches) is BatchSampler else None
    deals_in_turn = type(sampler) in _DEALING or getattr(sampler, "deals_in_turn", False)
    return sampler if deals_in_turn and isinstance(sampler, DistributedSampler) else None


def draws_whole_set(loader: Any) -> bool:
    """Return whether the order of a loader, over all ranks, is its whole dataset.

    The repeated rows that divide a set evenly among the ranks, and the last rows that ``drop_last`` leaves out, do not
    count. This is the only place that decides it.

    Args:
        loader: Any loader.
    """
    if not is_map_style(loader) or type(loader.batch_sampler) not in (BatchSampler, type(None)):
        return False
    return _is_whole(_inner_sampler(loader), len(loader.dataset))


def drawn_rows(loader: Any) -> list[int]:
    """Return the rows of the dataset that a loader draws over all ranks, each once, in ascending order.

    For `draws_whole_set` these are all rows. Any other sampler is read once, from a fixed seed; its own generator and
    those of the run are restored.

    Args:
        loader: A loader of which `is_map_style` is true.
    """
    if draws_whole_set(loader):
        return list(range(len(loader.dataset)))
    if type(loader.batch_sampler) in (BatchSampler, type(None)):
        source = _inner_sampler(loader)
    else:
        source = loader.batch_sampler
    return sorted(set(_drawn(source)))


class Share(NamedTuple):
    """The rows of a dataset that one rank reads."""

    indices: list[int]
    """As many on each rank, so that all make the same number of forward passes; the last ones may be repetitions."""
    rows: int
    """Number of indices that are no repetitions."""


def share_of_rank(loader: Any, limit: int, *, equal: bool, device: torch.device, evenly: bool = False) -> Share:
    """Return this rank's share of at most ``limit`` of the rows that a loader draws, chosen by a fixed seed.

    Args:
        loader: A loader of which `is_map_style` is true.
        limit: Maximum number of rows over all ranks.
        equal: Whether all ranks have the same loader, whose rows are divided. Otherwise a loader that no
            DistributedSampler divides holds the rows of its rank only.
        device: Device on which the process group communicates.
        evenly: Choose rows at equal distances instead.
    """
    rows, processes = drawn_rows(loader), world_size()
    if equal or _is_divided(loader) or processes == 1:
        rows = _chosen(rows, limit, evenly)
        own, longest = rows[rank() :: processes], -(-len(rows) // processes)
    else:
        own = _chosen(rows, max(1, limit // processes), evenly)
        longest = max(batch_sizes(len(own), device))
    filler = own or rows[:1] or list(range(len(loader.dataset)))[:1]
    repeated = [filler[i % len(filler)] for i in range(longest - len(own))] if filler else []
    return Share(own + repeated, len(own))


def _chosen(rows: list[int], limit: int, evenly: bool) -> list[int]:
    if len(rows) <= limit:
        return rows
    if evenly:
        return [rows[i * len(rows) // limit] for i in range(limit)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(derived_seed(SEED)))
    return sorted(rows[i] for i in order[:limit].tolist())


def _inner_sampler(loader: Any) -> Any:
    """Return the sampler of a loader, or the one that Lightning's wrapper divides among the ranks."""
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler.sampler
    return getattr(sampler.dataset, "_sampler", sampler) if isinstance(sampler, DistributedSamplerWrapper) else sampler


def _is_divided(loader: Any) -> bool:
    """Return whether the sampler of a loader divides the rows among the ranks."""
    source = loader if loader.batch_sampler is None else loader.batch_sampler
    return isinstance(getattr(source, "sampler", None), DistributedSampler)


def _is_whole(sampler: Any, total: int) -> bool:
    if isinstance(sampler, DistributedSampler):
        deals = type(sampler) is DistributedSampler or getattr(sampler, "deals_in_turn", False)
        return deals and len(sampler.dataset) == total  # type: ignore[arg-type]
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == total
    return type(sampler) is SequentialSampler and len(sampler) == total


def _drawn(source: Any) -> list[int]:
    """Read a sampler, or a sampler of batches, from a fixed seed."""
    try:
        count = len(source)
    except (TypeError, NotImplementedError):
        count = MAX_DRAWS
    owners = (source, getattr(source, "sampler", None))
    generators = [g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    drawn: list[int] = []
    try:
        with isolated(derived_seed(SEED)):
            for generator in generators:
                generator.manual_seed(derived_seed(SEED))
            for item in islice(iter(copy.copy(source)), count):
                drawn.extend(torch.as_tensor(item).flatten().tolist())  # an index, or those of a batch
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
    return drawn
