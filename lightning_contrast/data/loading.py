"""Datasets, samplers and loaders of the data modules: seeded order per epoch and exact resume within an epoch."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.seeding import derived_seed

Batch = tuple[Tensor, ...]
Layout = dict[str, int]


class BatchOrder(Protocol):
    """Order of the training images; see `StructuredBatches`."""

    @property
    def layout(self) -> Layout:
        """Numbers by name that must be equal to resume within an epoch."""
        ...

    def __len__(self) -> int:
        """Return the number of images N."""
        ...

    def order(self, *, seed: int, epoch: int) -> Tensor:
        """Return the images of an epoch in their order, ``(N,)`` int64."""
        ...


def replicas_and_rank(trainer: Trainer | None) -> tuple[int, int]:
    """Return the number of processes that share the data and the rank of this one.

    Args:
        trainer: The Trainer that requests a loader; None uses torch.distributed if it is initialized.
    """
    if trainer is not None:
        kwargs = trainer.distributed_sampler_kwargs
        return (1, 0) if kwargs is None else (int(kwargs["num_replicas"]), int(kwargs["rank"]))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def as_is(batch: Any) -> Any:
    """Return the batch unchanged: the dataset returns whole batches."""
    return batch


class MemoryImages(Dataset[Any]):
    """Images and labels held in memory, read a batch at a time by one index operation.

    Args:
        images: uint8 images, ``(N, C, H, W)``.
        labels: Class indices, ``(N,)`` int64; -1 for none.
        indices: Also yield the position of each image in this dataset, ``(B,)`` int64.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, indices: bool = False) -> None:
        if len(images) != len(labels):
            fail(
                "labels", f"have one row for each of the {len(images)} images", len(labels), "Give one label per image"
            )
        self.images, self.labels, self.indices = images, labels, indices

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        """Return one image ``(C, H, W)``, its label ``()`` and, with ``indices``, its position ``()``."""
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return the images ``(B, C, H, W)``, labels ``(B,)`` and, with ``indices``, positions ``(B,)`` of a batch."""
        rows = torch.as_tensor(indices)
        batch = (self.images[rows], self.labels[rows])
        return (*batch, rows) if self.indices else batch


class SeededIndex(int):
    """An index in the training order with a seed for what the dataset draws for this image in this epoch.

    Args:
        index: Index in the dataset.
        seed: A function of (seed of the order, epoch, index), so that resumed runs draw the same.
    """

    def __new__(cls, index: int, seed: int = 0) -> "SeededIndex":
        """Return the index; it compares and computes as a plain integer."""
        made = super().__new__(cls, index)
        made.seed = seed
        return made

    seed: int


class EpochSampler(DistributedSampler[Any]):
    """Samples the share of one rank in an order that is a function of (seed, epoch).

    A subclass of DistributedSampler, so that Lightning does not replace it and calls `set_epoch` with any number of
    processes.

    Args:
        dataset: The dataset.
        replicas: Number of processes that share the dataset.
        rank: Rank of this process.
        shuffle: Draw a new order in each epoch.
        seed: Seed of the orders, >= 0.
        drop_last: If the size is not divisible by the number of processes, drop rows (True) or repeat some (False).
        alone: Whether it was created before the number of processes was known.
        batches: Order of the images instead of a random one; see `StructuredBatches`.
    """

    deals_in_turn = True
    """Row i of rank r is position ``i * replicas + r`` of the order, as in DistributedSampler."""

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        alone: bool = False,
        batches: BatchOrder | None = None,
    ) -> None:
        super().__init__(dataset, replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        if batches is not None:
            total = len(dataset)  # type: ignore[arg-type]
            hint = "Give one row for each training image, in the order of the training set"
            require(len(batches) == total, "batches", f"describe the {total} training images", len(batches), hint)
        self.alone, self.batches = alone, batches
        self.first = 0  # rows of this rank that the next pass skips after a resume

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by the Trainer before each epoch.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            RuntimeError: If the loader was created for one process and is used by several.
        """
        processes, _ = replicas_and_rank(None)
        if self.alone and self.shuffle and processes > 1:
            raise RuntimeError(
                f"This training loader was created for one process and is used by {processes}, which would all see "
                "the same images. Pass the data module to the Trainer: `fit(model, datamodule=...)`."
            )
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        total = len(self.dataset)  # type: ignore[arg-type]  # map-style datasets have a length
        if self.shuffle and self.batches is not None:
            order = self.batches.order(seed=self.seed, epoch=self.epoch)
        elif self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
            order = torch.randperm(total, generator=generator)
        else:
            order = torch.arange(total)
        repeats = -(-self.total_size // total)
        rows = order.repeat(repeats)[: self.total_size][self.rank :: self.num_replicas][self.first :].tolist()
        if self.shuffle and getattr(self.dataset, "takes_seeds", False):
            return (SeededIndex(row, derived_seed(self.seed, self.epoch, row)) for row in rows)
        return iter(rows)


class _Pass:
    """Token of one pass over a loader; collected when the pass ends or is abandoned."""


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that resumes within an epoch at the same batch.

    Lightning saves `state_dict` with every checkpoint and restores it before the first batch. Resume is exact with an
    `EpochSampler`. A pass starts at its first batch and not at ``iter(loader)``, because Lightning calls ``iter``
    before it sets the epoch. A second pass during the first one (the bank of a k-NN probe) does not change the
    position.
    """

    # Class attributes instead of __init__: Lightning recreates loaders from the arguments of DataLoader.
    _position: int = 0  # batches of epoch `_epoch` yielded by the outermost pass
    _epoch: int = 0
    _resume: dict[str, Any] | None = None
    _tracked: weakref.ref[_Pass] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of batches yielded in it, and the data layout that this number refers to."""
        epoch = self._sampler_epoch()
        position = self._position if self._epoch == epoch else 0
        return {"epoch": epoch, "position": position, "layout": self._layout()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next pass at a saved position; a position equal to the length is a complete epoch.

        Args:
            state: The value returned by `state_dict`; it applies only in the saved epoch.
        """
        self._resume = dict(state)
        self._position, self._epoch = int(state["position"]), int(state["epoch"])
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(self._epoch)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # DataLoader names its private iterator class
        mark = _Pass()
        self._tracks(mark)
        return self._batches(mark)

    def _batches(self, mark: _Pass) -> Iterator[Any]:
        epoch = self._sampler_epoch()
        resume = None
        if self._tracks(mark):
            resume, self._resume = self._resume, None
        start = self._start(resume, epoch)
        for position, batch in enumerate(self._from(start), start + 1):
            if self._tracks(mark):
                self._position, self._epoch = position, epoch
            yield batch

    def _from(self, start: int) -> Iterator[Any]:
        """Yield the batches of this epoch from index ``start``."""
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # the sampler of Lightning for `overfit_batches`
            batches = super().__iter__()
            for _ in range(start):
                next(batches, None)
            yield from batches
            return
        if self.generator is not None:  # seeds the workers instead of the global generator
            self.generator.manual_seed(derived_seed(sampler.seed, sampler.epoch, sampler.rank + 1))
        sampler.first = start * (self.batch_size or 1)
        try:
            batches = super().__iter__()
            head = next(batches, None)  # the sampler has been read, with and without workers
        finally:
            sampler.first = 0
        if head is not None:
            yield head
            yield from batches

    def _start(self, resume: dict[str, Any] | None, epoch: int) -> int:
        if resume is None or resume["epoch"] != epoch:
            return 0
        start = int(resume["position"]) % max(len(self), 1)
        layout = self._layout()
        if start and resume["layout"] != layout:
            raise ValueError(
                f"A run that stopped within an epoch must resume with the same data layout, got {layout} instead of "
                f"{resume['layout']}. Use the same settings, or resume from a checkpoint at the end of an epoch."
            )
        return start

    def _tracks(self, mark: _Pass) -> bool:
        """Return whether ``mark`` is the tracked pass; it becomes tracked if no other pass is active."""
        if self._tracked is None or self._tracked() is None:
            self._tracked = weakref.ref(mark)
        return self._tracked() is mark

    def _sampler_epoch(self) -> int:
        return int(getattr(self.sampler, "epoch", 0))

    def _layout(self) -> Layout:
        sampler = self.sampler
        batches = getattr(sampler, "batches", None)
        order = {} if batches is None else batches.layout
        return order | {
            "images": len(self.dataset),  # type: ignore[arg-type]
            "batch_size": self.batch_size or 0,
            "processes": int(getattr(sampler, "num_replicas", 1)),
            "seed": int(getattr(sampler, "seed", 0)),
        }


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    trainer: Trainer | None,
    train: bool,
    seed: int,
    batches: BatchOrder | None = None,
    **kwargs: Any,
) -> ResumableLoader:
    """Return a loader for one rank of the run.

    Training is shuffled by (seed, epoch), and rows that do not fill a batch on every rank are dropped; evaluation is in
    order and complete (with several ranks some rows are repeated, as by the sampler of Lightning).

    Args:
        dataset: The dataset.
        batch_size: Images per batch on each rank, >= 1.
        trainer: The Trainer that requests the loader, or None.
        train: True for training, False for evaluation.
        seed: Seed of the orders, >= 0.
        batches: Order of the training images; None shuffles them.
        **kwargs: Further arguments of DataLoader.

    Raises:
        ValueError: If the dataset is empty or, in training, does not fill one batch.
    """
    total = len(dataset)  # type: ignore[arg-type]
    require(total > 0, "dataset", "hold at least one image", total, "Check the folder and the split")
    replicas, rank = replicas_and_rank(trainer)
    share = total // replicas
    if train and batch_size > share:
        fail(
            "batch_size",
            f"be at most {share}, the images of one of {replicas} processes",
            batch_size,
            "Lower it or add data",
        )
    alone = trainer is None and replicas == 1
    batches = batches if train else None
    sampler = EpochSampler(
        dataset, replicas=replicas, rank=rank, shuffle=train, seed=seed, drop_last=train, alone=alone, batches=batches
    )
    return ResumableLoader(
        dataset, batch_size=batch_size, sampler=sampler, drop_last=train, generator=torch.Generator(), **kwargs
    )


def check_loading(batch_size: int, seed: int) -> None:
    """Check the arguments shared by all data modules."""
    check_at_least("batch_size", batch_size, 1)
    check_at_least("seed", seed, 0)
