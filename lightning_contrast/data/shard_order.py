"""Training order of sharded images: each worker reads its own shards."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_contrast.data.loading import Layout
from lightning_contrast.seeding import derived_seed


class ShardOrder:
    """Order of the training images in which each worker of each rank reads a few shards at a time.

    In each epoch the shards are shuffled, and so are the images of each shard. This sequence is cut into equal parts
    for the ranks, and these into parts for their workers, which makes batch k of a rank in worker ``k % workers``, as
    DataLoader has it. A worker shuffles the images of ``mix_shards`` successive shards. Each image comes once; with
    a number that is not divisible, a random few are left out in an epoch.

    Args:
        sizes: Number of images of each shard, >= 1.
        replicas: Number of processes that share the shards, >= 1.
        workers: Number of workers of each process, >= 1.
        batch_size: Images per batch on each process, >= 1.
        mix_shards: Number of shards whose images are shuffled together, >= 1.

    Attributes:
        layout: Numbers that must be equal to resume within an epoch.
    """

    def __init__(self, sizes: Sequence[int], *, replicas: int, workers: int, batch_size: int, mix_shards: int) -> None:
        self.sizes = torch.tensor(sizes, dtype=torch.int64)
        self.replicas, self.workers, self.batch_size, self.mix_shards = replicas, workers, batch_size, mix_shards
        content = hashlib.blake2b(self.sizes.numpy().tobytes(), digest_size=4).digest()
        shards = int.from_bytes(content, "big")
        self.layout: Layout = {"shards": shards, "workers": workers, "mix_shards": mix_shards}

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def order(self, *, seed: int, epoch: int) -> Tensor:
        """Return the images of an epoch in their order, ``(N,)`` int64; rank r takes every ``replicas``-th, from r.

        Args:
            seed: Seed of the orders, >= 0.
            epoch: Number of the epoch, from 0.
        """
        generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
        turn = torch.randperm(len(self.sizes), generator=generator)
        turns = turn.repeat_interleave(self.sizes)  # of the shard of each image
        rows = _sorted(torch.randperm(len(turns), generator=generator), turns)
        share = len(rows) // self.replicas
        own = [self._dealt(rows[rank * share : (rank + 1) * share], turns, generator) for rank in range(self.replicas)]
        return torch.cat([torch.stack(own, dim=1).flatten(), rows[share * self.replicas :]])

    def _dealt(self, rows: Tensor, turns: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images of one rank, ``(share,)``, so that each worker gets successive shards."""
        batches = len(rows) // self.batch_size
        counts = torch.tensor([len(range(worker, batches, self.workers)) for worker in range(self.workers)])
        used, rest = rows[: batches * self.batch_size], rows[batches * self.batch_size :]
        worker = torch.arange(self.workers).repeat_interleave(counts * self.batch_size)
        starts = counts.cumsum(0) - counts
        first = turns[used[(starts * self.batch_size).clamp(max=max(len(used) - 1, 0))]] if len(used) else turns[:0]
        window = (turns[used] - first[worker]) // self.mix_shards
        group = worker * (len(self.sizes) + 1) + window
        shuffled = torch.randperm(len(used), generator=generator)
        used = used[_sorted(shuffled, group)].reshape(batches, self.batch_size)
        batch = torch.arange(batches)
        return torch.cat([used[starts[batch % self.workers] + batch // self.workers].flatten(), rest])


def _sorted(rows: Tensor, keys: Tensor) -> Tensor:
    """Return rows ``(N,)`` sorted by ``keys[row]``; equal ones keep their order."""
    return rows[keys[rows].argsort(stable=True)]
