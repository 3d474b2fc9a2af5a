"""A bounded sample of what a run's layers gave in its last batches."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from lightning_contrast import distributed

Entry = dict[str, Tensor]


class Reservoir:
    """Keeps tensors of the last batches, by name, each with one row for an image in its last dimension but one.

    Memory: ``batches`` entries of ``rows`` images each. In a checkpoint it is the same: what all ranks hold, by rank.

    Args:
        batches: Entries kept at most.
    """

    def __init__(self, batches: int) -> None:
        self._entries: deque[Entry] = deque(maxlen=batches)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Keep what one batch gave; the oldest batch goes where there are too many."""
        self._entries.append(entry)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def names(self) -> set[str]:
        """Return the names that every entry has."""
        return set.intersection(*(set(entry) for entry in self._entries)) if self._entries else set()

    def gathered(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the rows of all batches and ranks, and the batch that each is from.

        Args:
            name: One of `names`; the tensors are ``(..., R, D)``, R images each, equal in the other dimensions.

        Returns:
            ``(N, ..., D)`` and ``(N,)``; different ranks hold different batches.
        """
        parts = [entry[name].movedim(-2, 0) for entry in self._entries]
        rows = torch.cat(parts)
        number = [i * distributed.world_size() + distributed.rank() for i in range(len(parts))]
        sizes = torch.tensor([len(part) for part in parts])
        batches = torch.tensor(number).repeat_interleave(sizes).to(rows.device)
        return distributed.gather(rows), distributed.gather(batches)

    def state(self) -> list[list[Entry]]:
        """Return the entries of all ranks, on the CPU; every rank must call it."""
        own = [{name: value.detach().cpu() for name, value in entry.items()} for entry in self._entries]
        if not distributed.is_distributed():
            return [own]
        everyone: list[Any] = [None] * distributed.world_size()
        torch.distributed.all_gather_object(everyone, own)
        return everyone

    def restore(self, state: list[list[Entry]], device: torch.device) -> None:
        """Take this rank's entries out of a state; nothing, where the number of ranks has changed."""
        self.clear()
        if len(state) == distributed.world_size():
            for entry in state[distributed.rank()]:
                self.add({name: value.to(device) for name, value in entry.items()})
