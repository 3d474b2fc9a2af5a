"""A bounded set of images with their features, as validation or a forward pass of its own gave them."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_contrast import distributed


class Part(NamedTuple):
    """What one rank took of one batch."""

    places: Tensor
    """(R,), the places in this rank's share of the set, int64."""
    features: Tensor
    """(R, F), float32."""
    pictures: Tensor
    """uint8 (R, 3, edge, edge)."""
    labels: Tensor | None
    """(R,), int64, -1 for none; None where the batches have no classes."""

    def cpu(self) -> "Part":
        """Return it where every process can send it from."""
        labels = None if self.labels is None else self.labels.cpu()
        return Part(self.places.cpu(), self.features.cpu(), self.pictures.cpu(), labels)


class Gallery(NamedTuple):
    """Images of all ranks, in the order of their set, on the CPU."""

    features: Tensor
    """(N, F), float32."""
    pictures: Tensor
    """uint8 (N, 3, edge, edge)."""
    labels: Tensor | None
    """(N,), int64, -1 for none; None where the batches have no classes."""
    names: Tensor
    """(N,), int64: the same picture has the same number in every epoch, whatever its place."""

    def only(self, keep: Tensor) -> "Gallery":
        """Return the images where ``keep`` (N,) is True."""
        labels = None if self.labels is None else self.labels[keep]
        return Gallery(self.features[keep], self.pictures[keep], labels, self.names[keep])


class Share:
    """Chooses this rank's images of a set, spread evenly over its batches.

    Args:
        limit: Images of all ranks, at most.
        batches: Batches that this rank will see; infinity where nobody knows, and then the first images are taken.
    """

    def __init__(self, limit: int, batches: float) -> None:
        self.batches = batches
        self._own = -(-limit // distributed.world_size())
        self._seen = self._taken = 0
        self._total: float | None = None

    def places(self, count: int) -> list[tuple[int, int]]:
        """Return the row in the coming batch, and the place in the set, of each image that is wanted.

        Args:
            count: Rows of the batch; the first batch tells how many there will be in all.
        """
        if self._total is None:
            self._total = self.batches * count
        places = range(self._seen, self._seen + count)
        share = 1.0 if math.isinf(self._total) else min(1.0, self._own / self._total)
        wanted = [(row, place) for row, place in enumerate(places) if int((place + 1) * share) > int(place * share)]
        wanted = wanted[: self._own - self._taken]
        self._seen, self._taken = self._seen + count, self._taken + len(wanted)
        return wanted


def gather_gallery(parts: Sequence[Part], limit: int) -> Gallery | None:
    """Return the images of all ranks on rank 0, None on the others or without any; every rank must call it.

    Args:
        parts: Those of this rank.
        limit: Images of all ranks, at most.
    """
    everyone = [[part.cpu() for part in parts]]
    if distributed.is_distributed():
        received: list[list[Part]] = [[] for _ in range(distributed.world_size())]
        torch.distributed.gather_object(everyone[0], received if distributed.rank() == 0 else None)
        everyone = received  # lists without parts on the other ranks
    ranks = [torch.full_like(part.places, rank) for rank, of_rank in enumerate(everyone) for part in of_rank]
    found = [part for of_rank in everyone for part in of_rank]
    if not found:
        return None
    # As one process would read the set: the ranks take turns.
    order = (torch.cat([p.places for p in found]) * len(everyone) + torch.cat(ranks)).argsort()[:limit]
    pictures = torch.cat([part.pictures for part in found])[order]
    labels = [part.labels for part in found if part.labels is not None]
    return Gallery(
        features=torch.cat([part.features for part in found])[order].float(),
        pictures=pictures,
        labels=torch.cat(labels)[order] if len(labels) == len(found) else None,
        names=torch.tensor([_name(picture) for picture in pictures], dtype=torch.int64),
    )


def _name(picture: Tensor) -> int:
    """Return a number that is a function of the pixels."""
    digest = hashlib.blake2b(picture.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
