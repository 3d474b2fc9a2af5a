"""What all data modules load with: whole batches from memory, an order per epoch, and exact resume in mid-epoch."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.seeding import seed_of

Batch = tuple[Tensor, ...]
Layout = dict[str, int]


def replicas_and_rank(trainer: Trainer | None) -> tuple[int, int]:
    """Return how many processes share the data, and which of them this is.

    Args:
        trainer: The Trainer that asks for a loader. Without one, torch.distributed answers where it runs.
    """
    if trainer is not None:
        kwargs = trainer.distributed_sampler_kwargs
        return (1, 0) if kwargs is None else (int(kwargs["num_replicas"]), int(kwargs["rank"]))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def as_is(batch: Any) -> Any:
    """Collate nothing: the set already answers with a batch."""
    return batch


class MemoryImages(Dataset[Batch]):
    """Images and labels held in memory, read a batch at a time by one index operation.

    Args:
        images: uint8 images, ``(N, C, H, W)``.
        labels: Class numbers, ``(N,)`` int64; -1 where there is none.
        indices: Also yield the position of each image in this set, ``(B,)`` int64.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, indices: bool = False) -> None:
        if len(images) != len(labels):
            fail(
                "labels", f"have one row for each of the {len(images)} images", len(labels), "Give one label per image"
            )
        self.images, self.labels, self.indices = images, labels, indices

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """Return one image ``(C, H, W)``, its label ``()`` and, where asked for, its index ``()``."""
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the images ``(B, C, H, W)``, labels ``(B,)`` and, where asked for, indices ``(B,)`` of a batch."""
        rows = torch.as_tensor(indices)
        batch = (self.images[rows], self.labels[rows])
        return (*batch, rows) if self.indices else batch


class EpochSampler(DistributedSampler[Any]):
    """The share of one rank in an order that is a function of (seed, epoch).

    A subclass of DistributedSampler, so that Lightning neither replaces it nor goes round it, and calls `set_epoch` on
    one process as on several.

    Args:
        dataset: What is sampled from.
        replicas: Number of processes that share the set.
        rank: Which of them this is, from 0.
        shuffle: Draw a new order in each epoch.
        seed: Seed of the orders, >= 0.
        drop_last: Where the set does not divide: leave rows out (True) or repeat some (False).
        alone: Made before it could be known with how many processes the set is shared.
    """

    deals_in_turn = True
    """Row i of rank r is place ``i * replicas + r`` of the order, as in the class that it extends."""

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
    ) -> None:
        super().__init__(dataset, replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.alone = alone
        self.first = 0  # rows of this rank that the next pass leaves out, because a run has seen them

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; a Trainer does so before each.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            RuntimeError: If every process would train on the same images, since the loader knows of one process only.
        """
        processes, _ = replicas_and_rank(None)
        if self.alone and self.shuffle and processes > 1:
            raise RuntimeError(
                f"This training loader was made for one process and is used by {processes}, which would all see "
                "the same images. Give the data module itself to the Trainer: `fit(model, datamodule=...)`."
            )
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        total = len(self.dataset)  # type: ignore[arg-type]  # a map-style set has a length, its type does not say so
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
            order = torch.randperm(total, generator=generator)
        else:
            order = torch.arange(total)
        repeats = -(-self.total_size // total)
        rows = order.repeat(repeats)[: self.total_size][self.rank :: self.num_replicas]
        return iter(rows[self.first :].tolist())


class _Pass:
    """Stands for one pass over a loader: dead as soon as the pass has ended or was dropped."""


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that can be left in mid-epoch and taken up again at the same batch.

    Lightning saves `state_dict` with every checkpoint and hands it back before the first batch. Exact where the order
    is an `EpochSampler`'s. A pass begins at its first batch and not at ``iter(loader)``, since Lightning calls ``iter``
    before it sets the epoch. A second pass inside the first (the bank of a k-NN probe) leaves the position alone.
    """

    # Class attributes and no __init__: Lightning builds some loaders anew from the arguments of DataLoader.
    _position: int = 0  # batches of epoch `_epoch` that the outermost pass has yielded
    _epoch: int = 0
    _resume: dict[str, Any] | None = None
    _tracked: weakref.ref[_Pass] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches seen, and the layout in which that number means something."""
        epoch = self._sampler_epoch()
        position = self._position if self._epoch == epoch else 0
        return {"epoch": epoch, "position": position, "layout": self._layout()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next pass begin where the saved one stood; a saved position equal to the length is a whole epoch.

        Args:
            state: What `state_dict` returned. It counts only while the sampler stays in the saved epoch.
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
        """Yield the batches of this epoch from number ``start`` on."""
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Lightning's own order for `overfit_batches`
            batches = super().__iter__()
            for _ in range(start):
                next(batches, None)
            yield from batches
            return
        if self.generator is not None:  # seeds the workers; the global generator is not touched
            self.generator.manual_seed(seed_of(sampler.seed, sampler.epoch, sampler.rank + 1))
        sampler.first = start * (self.batch_size or 1)
        try:
            batches = super().__iter__()
            head = next(batches, None)  # the sampler is read by now, with workers and without
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
                f"A run that stopped in mid-epoch must go on with the same data layout, got {layout} instead of "
                f"{resume['layout']}. Use the same settings, or resume from a checkpoint of an epoch's end."
            )
        return start

    def _tracks(self, mark: _Pass) -> bool:
        """Tell whether ``mark`` is the pass whose position counts; it becomes that if no other is under way."""
        if self._tracked is None or self._tracked() is None:
            self._tracked = weakref.ref(mark)
        return self._tracked() is mark

    def _sampler_epoch(self) -> int:
        return int(getattr(self.sampler, "epoch", 0))

    def _layout(self) -> Layout:
        sampler = self.sampler
        return {
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
    **kwargs: Any,
) -> ResumableLoader:
    """Return a loader for one rank of the run.

    Training is shuffled by (seed, epoch), and rows that do not fill a batch on every rank are left out of an epoch;
    evaluation is in order and complete (under several ranks a few rows are repeated, as Lightning's sampler does).

    Args:
        dataset: The set.
        batch_size: Images per batch on each rank, >= 1.
        trainer: The Trainer that asks, if any.
        train: Training or evaluation.
        seed: Seed of the orders, >= 0.
        **kwargs: More arguments of DataLoader.

    Raises:
        ValueError: If the set is empty or, in training, does not fill one batch.
    """
    total = len(dataset)  # type: ignore[arg-type]
    require(
        total > 0, "dataset", "hold at least one image", total, "Look at the folder or the split that was asked for"
    )
    replicas, rank = replicas_and_rank(trainer)
    share = total // replicas
    if train and batch_size > share:
        fail(
            "batch_size",
            f"be at most {share}, the images of one of {replicas} processes",
            batch_size,
            "Lower it, or add data",
        )
    alone = trainer is None and replicas == 1
    sampler = EpochSampler(
        dataset, replicas=replicas, rank=rank, shuffle=train, seed=seed, drop_last=train, alone=alone
    )
    return ResumableLoader(
        dataset, batch_size=batch_size, sampler=sampler, drop_last=train, generator=torch.Generator(), **kwargs
    )


def check_loading(batch_size: int, seed: int) -> None:
    """Check what every data module takes."""
    check_at_least("batch_size", batch_size, 1)
    check_at_least("seed", seed, 0)
