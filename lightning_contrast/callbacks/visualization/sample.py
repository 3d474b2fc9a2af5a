"""Bounded sample of images and their features, collected from validation or from an extra forward pass."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_contrast import distributed


class Part(NamedTuple):
    """Sampled images of one batch on one rank."""

    positions: Tensor
    """Positions in this rank's share of the dataset, int64, ``(R,)``."""
    features: Tensor
    """Features, float32, ``(R, F)``."""
    pictures: Tensor
    """Thumbnails, uint8, ``(R, 3, edge, edge)``."""
    labels: Tensor | None
    """Labels, int64, ``(R,)``, -1 for none; None if the batches have no classes."""

    def cpu(self) -> "Part":
        """Return a copy on the CPU."""
        labels = None if self.labels is None else self.labels.cpu()
        return Part(self.positions.cpu(), self.features.cpu(), self.pictures.cpu(), labels)

    def select(self, keep: Tensor) -> "Part":
        """Return the images where ``keep``, bool ``(R,)``, is True."""
        labels = None if self.labels is None else self.labels[keep]
        return Part(self.positions[keep], self.features[keep.to(self.features.device)], self.pictures[keep], labels)


class Sample(NamedTuple):
    """Sampled images of all ranks in dataset order, on the CPU."""

    features: Tensor
    """Features, float32, ``(N, F)``."""
    pictures: Tensor
    """Thumbnails, uint8, ``(N, 3, edge, edge)``."""
    labels: Tensor | None
    """Labels, int64, ``(N,)``, -1 for none; None if the batches have no classes."""
    ids: Tensor
    """Hashes of the pixels, int64, ``(N,)``: equal for the same image in every epoch and order."""

    def select(self, keep: Tensor) -> "Sample":
        """Return the images where ``keep``, bool ``(N,)``, is True."""
        labels = None if self.labels is None else self.labels[keep]
        return Sample(self.features[keep], self.pictures[keep], labels, self.ids[keep])


class SampleShare:
    """Choice of this rank's part of the sample, evenly spread over its batches.

    Args:
        limit: Maximum number of images over all ranks.
        batches: Number of batches of this rank; infinity if unknown, in which case the first images are chosen.
    """

    def __init__(self, limit: int, batches: float) -> None:
        self.batches = batches
        self._limit = -(-limit // distributed.world_size())
        self._seen = self._taken = 0
        self._total: float | None = None

    def choose(self, count: int) -> list[tuple[int, int]]:
        """Return the row in the next batch and the position in the dataset of each chosen image.

        Args:
            count: Number of images in the batch; that of the first batch determines the size of the dataset.
        """
        if self._total is None:
            self._total = self.batches * count
        positions = range(self._seen, self._seen + count)
        share = 1.0 if math.isinf(self._total) else min(1.0, self._limit / self._total)
        chosen = [(row, i) for row, i in enumerate(positions) if int((i + 1) * share) > int(i * share)]
        chosen = chosen[: self._limit - self._taken]
        self._seen, self._taken = self._seen + count, self._taken + len(chosen)
        return chosen


def gather_sample(parts: Sequence[Part], limit: int) -> Sample | None:
    """Gather the images of all ranks on rank 0; a collective operation.

    Args:
        parts: Images of this rank.
        limit: Maximum number of images over all ranks.

    Returns:
        The sample on rank 0; None on other ranks, or if there are no images.
    """
    everyone = [[part.cpu() for part in parts]]
    if distributed.is_distributed():
        received: list[list[Part]] = [[] for _ in range(distributed.world_size())]
        torch.distributed.gather_object(everyone[0], received if distributed.rank() == 0 else None)
        everyone = received  # empty lists on the other ranks
    ranks = [torch.full_like(part.positions, rank) for rank, of_rank in enumerate(everyone) for part in of_rank]
    found = [part for of_rank in everyone for part in of_rank]
    if not found:
        return None
    # The order in which a single process would read the dataset: ranks alternate.
    order = (torch.cat([p.positions for p in found]) * len(everyone) + torch.cat(ranks)).argsort()[:limit]
    pictures = torch.cat([part.pictures for part in found])[order]
    labels = [part.labels for part in found if part.labels is not None]
    return Sample(
        features=torch.cat([part.features for part in found])[order].float(),
        pictures=pictures,
        labels=torch.cat(labels)[order] if len(labels) == len(found) else None,
        ids=torch.tensor([_hash(picture) for picture in pictures], dtype=torch.int64),
    )


def _hash(picture: Tensor) -> int:
    """Return a 64-bit hash of the pixels."""
    digest = hashlib.blake2b(picture.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
