"""Labeled batches from a loader of a callback's own: division among ranks, position, padding."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_contrast._checks import fail, require
from lightning_contrast.callbacks.capture.sampling import SEED, dealing_sampler, draws_whole_set
from lightning_contrast.distributed import rank, world_size
from lightning_contrast.seeding import derived_seed, isolated

BATCH_SIZE = 64
"""Images per forward pass where a loader with a sampler of batches does not name its batch size."""


def check_source(name: str, data: Any) -> None:
    """Check that ``data`` is a LightningDataModule or an iterable that can be read more than once.

    Args:
        name: Name of the argument, for messages.
        data: Value of the argument.

    Raises:
        TypeError: If it is neither.
    """
    hint = "Give a LightningDataModule, or a DataLoader that yields (images, labels)"
    if not _is_data_module(data) and (not hasattr(data, "__iter__") or isinstance(data, str | torch.Tensor)):
        fail(name, "be a DataModule or a loader", type(data).__name__, hint, TypeError)
    if hasattr(data, "__next__"):
        fail(name, "be a loader that can be read more than once", type(data).__name__, hint, TypeError)


def training_loader(name: str, data: Any, trainer: Any) -> Any:
    """Return the loader itself, or the training loader of a DataModule, which is prepared and set up first.

    Args:
        name: Name of the argument ``data``, for messages.
        data: See `check_source`.
        trainer: The Trainer, from which a DataModule may read the number of processes.

    Raises:
        ValueError: If ``data`` is the DataModule of the run.
    """
    if not _is_data_module(data):
        return data
    hint = f"Leave `{name}` out, or give another DataModule"
    require(data is not trainer.datamodule, name, "be another DataModule than the run's", type(data).__name__, hint)
    with isolated(derived_seed(SEED), trainer.strategy.root_device):
        data.trainer = trainer
        if trainer.local_rank == 0:
            data.prepare_data()
        trainer.strategy.barrier()
        data.setup("fit")
        return data.train_dataloader()


def data_module_loader(trainer: Any) -> Any:
    """Return the training loader of the run's DataModule, if the Trainer validates or tests without a fit.

    Args:
        trainer: The Trainer.

    Returns:
        The loader, or None if there is none.
    """
    data = trainer.datamodule
    if trainer.state.fn == "fit" or data is None:
        return None
    with isolated(derived_seed(SEED), trainer.strategy.root_device):
        data.setup("fit")
        try:
            return data.train_dataloader()
        except (NotImplementedError, MisconfigurationException):
            return None


def rank_share(loader: Any) -> Any:
    """Return the loader of one rank: an ordinary DataLoader is divided among the ranks, as Lightning does it.

    Args:
        loader: Any loader. One with its own sampler, over an iterable dataset, or that is no DataLoader is returned
            unchanged.
    """
    if world_size() == 1 or not _is_ordinary(loader):
        return loader
    shuffle = isinstance(loader.sampler, RandomSampler)
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, world_size(), rank(), shuffle=shuffle, seed=SEED, drop_last=loader.drop_last
    )
    return like(loader, sampler, drop_last=loader.drop_last)


def like(loader: Any, sampler: Any, *, drop_last: bool) -> DataLoader[Any]:
    """Return a DataLoader over the same dataset, with the same collation and workers, but another sampler."""
    batch_size = loader.batch_size
    if batch_size is None and loader.batch_sampler is not None:  # a sampler of batches has replaced the batch size
        batch_size = int(getattr(loader.batch_sampler, "batch_size", BATCH_SIZE))
    settings = ("collate_fn", "num_workers", "timeout", "worker_init_fn", "multiprocessing_context")
    given = {name: getattr(loader, name) for name in (*settings, "prefetch_factor", "pin_memory")}
    generator = torch.Generator().manual_seed(SEED)
    return DataLoader(loader.dataset, batch_size, sampler=sampler, drop_last=drop_last, generator=generator, **given)


class LabeledStream:
    """Endless stream of labeled batches whose position can be saved and restored.

    Random numbers that the loader draws are seeded by the pass and the batch, so that the run's generators do not
    change and a position is reproducible. A loader with ``state_dict`` and ``load_state_dict`` restores its own state;
    any other is read up to the position.

    Args:
        data: See `check_source`.
        name: Name of the argument, for messages.

    Raises:
        TypeError: If ``data`` is neither a DataModule nor an iterable that can be read more than once.
    """

    def __init__(self, data: Any, name: str = "dataloader") -> None:
        check_source(name, data)
        self.data, self.name = data, name
        self._loader: Any = None
        self._iterator: Iterator[Any] | None = None
        self._passes = self._position = 0
        self._saved: Any = None

    def start(self, trainer: Any) -> None:
        """Create the loader of this rank."""
        if self._loader is None:
            self._loader = rank_share(training_loader(self.name, self.data, trainer))

    def next(self, device: torch.device) -> Any:
        """Return the next batch of the loader, on the device where the loader put it.

        Args:
            device: Its generator is preserved, as the CPU's is.

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
        hint = "Check its dataset, its batch size and `drop_last`"
        fail(self.name, "yield at least one batch", type(self._loader).__name__, hint)

    def close(self) -> None:
        """Shut down the workers; the position is kept."""
        self.load_state_dict(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        if self._iterator is None:
            return {"passes": self._passes, "position": self._position, "loader": self._saved}
        try:
            length = len(self._loader)
        except TypeError:
            length = -1  # an iterable dataset
        if self._position == length:
            return {"passes": self._passes + 1, "position": 0, "loader": None}
        return {"passes": self._passes, "position": self._position, "loader": self._state_of_loader()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position.

        Args:
            state: Result of `state_dict`.
        """
        self._iterator = None
        self._passes, self._position, self._saved = state["passes"], state["position"], state["loader"]

    def _open(self, device: torch.device) -> None:
        """Start the pass and advance to the position."""
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
            for batch_idx in range(position):
                self._read(batch_idx, device)

    def _read(self, batch_idx: int, device: torch.device) -> Any:
        assert self._iterator is not None  # opened before
        with isolated(derived_seed(SEED, self._passes, batch_idx, rank()), device):
            batch = next(self._iterator)
        self._position = batch_idx + 1
        return batch

    def _state_of_loader(self) -> Any:
        has_state = hasattr(self._loader, "state_dict") and hasattr(self._loader, "load_state_dict")
        return self._loader.state_dict() if has_state else None


def _is_data_module(data: Any) -> bool:
    return callable(getattr(data, "train_dataloader", None)) and callable(getattr(data, "setup", None))


def _is_ordinary(loader: Any) -> bool:
    """Return whether a loader reads a whole dataset in batches, and was not divided among the ranks before."""
    return draws_whole_set(loader) and type(loader.batch_sampler) is BatchSampler and dealing_sampler(loader) is None


class SamplerPadding:
    """Finds the rows of a rank's evaluation batches that another rank evaluates too.

    If a dataset does not divide by the number of ranks, the sampler that Lightning inserts, and that of this package's
    data modules, pad it with images that another rank has already. Other samplers are assumed not to repeat images.

    Args:
        loaders: The Trainer's evaluation loaders: one, or several in any container.
    """

    def __init__(self, loaders: Any) -> None:
        self._samplers = [dealing_sampler(loader) for loader in tree_leaves(loaders)]
        self._rows = [0] * len(self._samplers)

    def mask(self, loader: int, rows: int) -> Tensor | None:
        """Return which rows of a loader's next batch are not padding.

        Args:
            loader: Index of the loader.
            rows: Number of images in its next batch.

        Returns:
            ``(rows,)``, bool, on the CPU; None if there is no padding in the batch.
        """
        sampler = self._samplers[loader] if loader < len(self._samplers) else None
        if sampler is None:
            return None
        start = self._rows[loader]
        self._rows[loader] += rows
        total = len(sampler.dataset)  # type: ignore[arg-type]  # a dataset with a sampler has a length
        if (start + rows - 1) * sampler.num_replicas + sampler.rank < total:
            return None
        return torch.arange(start, start + rows) * sampler.num_replicas + sampler.rank < total
