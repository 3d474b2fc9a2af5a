"""Labelled batches beside those of the run: a loader or DataModule of its own, its shares and its position."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_contrast._checks import fail, require
from lightning_contrast.distributed import rank, world_size
from lightning_contrast.seeding import derived_seed, isolated

SEED = 7
"""Of the order of a loader without a seed of its own: its order must not be drawn from the run's generators."""


def check_source(name: str, data: Any) -> None:
    """Check that ``data`` is a DataModule or can be iterated more than once.

    Args:
        name: The argument that it was given as.
        data: What was given.

    Raises:
        TypeError: If it is neither.
    """
    mend = "Give a LightningDataModule, or a DataLoader that yields (images, labels)"
    if not _is_data_module(data) and (not hasattr(data, "__iter__") or isinstance(data, str | torch.Tensor)):
        fail(name, "be a DataModule or a loader", type(data).__name__, mend, TypeError)
    if hasattr(data, "__next__"):
        fail(name, "be a loader that can be read more than once", type(data).__name__, mend, TypeError)


def training_loader(name: str, data: Any, trainer: Any) -> Any:
    """Return the loader itself, or the training loader of a DataModule, which is prepared and set up.

    Args:
        name: The argument that ``data`` was given as.
        data: See `check_source`.
        trainer: The Trainer, which the DataModule may ask for the number of processes.
    """
    if not _is_data_module(data):
        return data
    mend = f"Leave `{name}` out, or give a DataModule of its own"
    require(data is not trainer.datamodule, name, "be another DataModule than the run's", type(data).__name__, mend)
    with isolated(derived_seed(SEED), trainer.strategy.root_device):
        data.trainer = trainer
        if trainer.local_rank == 0:
            data.prepare_data()
        trainer.strategy.barrier()
        data.setup("fit")
        return data.train_dataloader()


def rank_share(loader: Any) -> Any:
    """Return the loader of one rank: an ordinary DataLoader is divided among the ranks, as Lightning would do.

    Args:
        loader: Any loader. With a sampler of its own, over an iterable set, or no DataLoader, it stays as it is.
    """
    if world_size() == 1 or not _is_ordinary(loader):
        return loader
    shuffle = isinstance(loader.sampler, RandomSampler)
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, world_size(), rank(), shuffle=shuffle, seed=SEED, drop_last=loader.drop_last
    )
    return like(loader, sampler, drop_last=loader.drop_last)


def like(loader: Any, sampler: Any, *, drop_last: bool) -> DataLoader[Any]:
    """Return a DataLoader over the same set, with the same collation and workers, in another order."""
    settings = ("batch_size", "collate_fn", "num_workers", "timeout", "worker_init_fn", "multiprocessing_context")
    given = {name: getattr(loader, name) for name in (*settings, "prefetch_factor", "pin_memory")}
    return DataLoader(
        loader.dataset, sampler=sampler, drop_last=drop_last, generator=torch.Generator().manual_seed(SEED), **given
    )


class LabelledStream:
    """Yields batches of labelled data without end, from where a checkpoint left them.

    Random numbers that the loader draws come from the number of the pass and of the batch, so that the run's
    generators stay as they are and a position can be reached again. A loader with ``state_dict`` and
    ``load_state_dict`` is given its own state; any other is read up to the position.

    Args:
        data: See `check_source`.
        name: The argument that it was given as.
    """

    def __init__(self, data: Any, name: str = "data") -> None:
        check_source(name, data)
        self.data, self.name = data, name
        self._loader: Any = None
        self._iterator: Iterator[Any] | None = None
        self._passes = self._position = 0
        self._saved: Any = None

    def start(self, trainer: Any) -> None:
        """Prepare the loader."""
        if self._loader is None:
            self._loader = rank_share(training_loader(self.name, self.data, trainer))

    def next(self, device: torch.device) -> Any:
        """Return the next batch, as the loader gives it.

        Args:
            device: Whose generator is kept beside the CPU's.

        Raises:
            ValueError: If the loader is empty.
        """
        for _ in range(2):
            if self._iterator is None:
                self._open(device)
            try:
                return self._read(self._position, device)
            except StopIteration:
                if self._position == 0:
                    break
                self._passes, self._position, self._iterator = self._passes + 1, 0, None
        mend = "Look at its dataset, its batch size and `drop_last`"
        fail(self.name, "yield at least one batch", type(self._loader).__name__, mend)

    def close(self) -> None:
        """Let the workers go; the next batch is the one that would have come."""
        self.load_state_dict(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        if self._iterator is None:
            return {"passes": self._passes, "position": self._position, "loader": self._saved}
        try:
            length = len(self._loader)
        except TypeError:
            length = -1  # of an iterable set
        if self._position == length:
            return {"passes": self._passes + 1, "position": 0, "loader": None}
        return {"passes": self._passes, "position": self._position, "loader": self._state_of_loader()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.

        Args:
            state: What `state_dict` returned.
        """
        self._iterator = None
        self._passes, self._position, self._saved = state["passes"], state["position"], state["loader"]

    def _open(self, device: torch.device) -> None:
        """Begin the pass, and go to the position."""
        loader, saved, self._saved = self._loader, self._saved, None
        for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._passes)
        restored = saved is not None and hasattr(loader, "load_state_dict")
        if restored:
            loader.load_state_dict(saved)
        with isolated(derived_seed(SEED, self._passes), device):
            self._iterator = iter(loader)
        if not restored:
            position, self._position = self._position, 0
            for place in range(position):
                self._read(place, device)

    def _read(self, place: int, device: torch.device) -> Any:
        assert self._iterator is not None  # opened before
        with isolated(derived_seed(SEED, self._passes, place, rank()), device):
            batch = next(self._iterator)
        self._position = place + 1
        return batch

    def _state_of_loader(self) -> Any:
        has_state = hasattr(self._loader, "state_dict") and hasattr(self._loader, "load_state_dict")
        return self._loader.state_dict() if has_state else None


def _is_data_module(data: Any) -> bool:
    return callable(getattr(data, "train_dataloader", None)) and callable(getattr(data, "setup", None))


def _is_ordinary(loader: Any) -> bool:
    """Tell whether a loader reads a set of known length in an order of torch's own."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    sampler = loader.sampler
    whole = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    return whole and type(loader.batch_sampler) is BatchSampler
