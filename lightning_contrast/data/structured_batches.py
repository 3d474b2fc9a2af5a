"""Batches of near neighbors: negatives that are hard because they are alike."""

import hashlib

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.data.loading import EpochSampler, Layout, replicas_and_rank
from lightning_contrast.precision import upcast
from lightning_contrast.seeding import derived_seed

_ROWS = 1 << 16  # images whose features are in memory at a time


class StructuredBatches:
    """An order of the training images in which near neighbors, or images that share an attribute, are in one batch.

    In each epoch the images are cut anew into sets of ``size`` that are alike, and the sets come in a random order. All
    ranks share it: a set lies in one global batch, except where the batch is no multiple of ``size``. No image comes
    twice. The order is a function of (seed, epoch), and a `ResumableLoader` resumes within an epoch at the same batch.
    Give it to a data module as ``batches=``, or take its `sampler` for a loader of your own.

    Neighbors are found by a random binary tree as in Annoy (https://github.com/spotify/annoy): a node is halved at the
    median of the projections to the difference of two of its images. It takes O(N D log(N / size)) per epoch (2 s for
    100,000 images of 128 features on one core) and finds near, not nearest neighbors. Hard negatives that are in the
    batch are weighed by ``weighting="hard"`` of the losses.

    Neighbors of a class become negatives of each other: see ``mask_same`` and ``docs/negatives.md``.

    Args:
        features: Features of the training images in the order of the training set, (N, D), such as those of
            `evaluation.encode`; or attributes, one column each.
        groups: Instead of features a group of each training image, (N,) integers: images of one group are put together;
            an image below 0 is in no group.
        size: Images per set, >= 2: the whole batch is alike if it is the global batch size.

    Raises:
        ValueError: If not exactly one of both is given, their shape or a number does not fit, or a feature is not
            finite.
        TypeError: If the features are not floating point, the groups not integers, or ``size`` is not a whole number.

    Example:
        >>> batches = StructuredBatches(groups=torch.tensor([0, 1, 0, 1]), size=2)
        >>> sorted(sorted(pair.tolist()) for pair in batches.order(seed=0, epoch=0).view(2, 2))
        [[0, 2], [1, 3]]
    """

    def __init__(self, features: Tensor | None = None, *, groups: Tensor | None = None, size: int = 16) -> None:
        check_at_least("size", size, 2)
        one = (features is None) != (groups is None)
        hint = "Give features (N, D), or groups (N,)"
        require(one, "features", "be given without `groups`, or `groups` without them", "both or none", hint)
        if features is not None:
            if not features.is_floating_point():
                fail(
                    "features", "be floating point", str(features.dtype), "Convert attributes by `.float()`", TypeError
                )
            require(features.ndim == 2, "features", "be (N, D)", tuple(features.shape), "Give one row per image")
            finite = bool(features.isfinite().all())
            require(finite, "features", "be finite", "NaN or infinity", "Check the network that made them")
        if groups is not None:
            if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
                fail("groups", "be integers", str(groups.dtype), "Number the groups", TypeError)
            require(groups.ndim == 1, "groups", "be (N,)", tuple(groups.shape), "Give one group per image")
        self.features = None if features is None else upcast(features.detach().cpu())
        self.groups = None if groups is None else groups.detach().cpu().long()
        self.size = size

    def __len__(self) -> int:
        """Return the number of images."""
        known = self.features if self.features is not None else self.groups
        return 0 if known is None else len(known)

    def order(self, *, seed: int, epoch: int) -> Tensor:
        """Return the images of an epoch in their order, (N,) int64, each once.

        Args:
            seed: Seed of the order, >= 0.
            epoch: Number of the epoch, >= 0.
        """
        generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
        if self.features is not None:
            sets = _halve(self.features, torch.randperm(len(self), generator=generator), self.size, generator)
        else:
            sets = self._grouped(generator)
        full = [one for one in sets if len(one) == self.size]  # a smaller set would shift those after it
        rest = [one for one in sets if len(one) < self.size]
        order = torch.randperm(len(full), generator=generator).tolist()
        return torch.cat([*(full[place] for place in order), *rest])

    def sampler(
        self,
        dataset: "Dataset[object]",
        *,
        seed: int = 0,
        replicas: int | None = None,
        rank: int | None = None,
    ) -> EpochSampler:
        """Return a sampler of this rank's images for a loader with ``drop_last=True``, best a `ResumableLoader`.

        Args:
            dataset: The training set, of as many images.
            seed: Seed of the order, >= 0.
            replicas: Number of processes; None asks torch.distributed.
            rank: Rank of this process; given together with ``replicas``.
        """
        found = replicas_and_rank(None)
        alone = replicas is None and found[0] == 1
        return EpochSampler(
            dataset,
            replicas=found[0] if replicas is None else replicas,
            rank=found[1] if rank is None else rank,
            seed=seed,
            drop_last=True,
            alone=alone,
            batches=self,
        )

    @property
    def layout(self) -> Layout:
        """The digest, by name: see `ResumableLoader`."""
        return {"order": int(self.digest)}

    @property
    def digest(self) -> int:
        """A number that differs for other features, groups or sizes, by which a resumed run finds that they changed."""
        known = self.features if self.features is not None else self.groups
        content = b"" if known is None else known.contiguous().numpy().tobytes()
        found = hashlib.blake2b(content + str(self.size).encode(), digest_size=8).digest()
        return int.from_bytes(found, "big") >> 1

    def _grouped(self, generator: torch.Generator) -> list[Tensor]:
        """Return sets of images of one group; the last sets join what is left of the groups."""
        drawn = torch.randperm(len(self), generator=generator)
        groups = self.groups[drawn]  # type: ignore[index]  # only called with groups
        by_group = drawn[groups.argsort(stable=True)]
        counts = groups.sort(stable=True).values.unique_consecutive(return_counts=True)
        sets, left = [], []
        for number, rows in zip(counts[0].tolist(), torch.split(by_group, counts[1].tolist()), strict=True):
            whole = 0 if number < 0 else len(rows) // self.size * self.size
            sets += list(torch.split(rows[:whole], self.size)) if whole else []
            left.append(rows[whole:])
        order = torch.randperm(len(left), generator=generator).tolist()
        return sets + list(torch.split(torch.cat([left[place] for place in order]), self.size))


def _halve(features: Tensor, order: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """Return rows (n,) in sets of ``size`` that are near each other in features (N, D); the last may be smaller."""
    lengths = torch.tensor([len(order)])
    while int(lengths.max()) > size:  # all nodes of a level together
        node = torch.arange(len(lengths)).repeat_interleave(lengths)  # (n,)
        drawn = torch.rand(2, len(lengths), generator=generator, dtype=torch.float64)
        first, second = order[lengths.cumsum(0) - lengths + (drawn * lengths).long()]
        direction = features[second] - features[first]  # (nodes, D)
        parts = zip(torch.split(order, _ROWS), torch.split(node, _ROWS), strict=True)
        projections = torch.cat([(features[rows] * direction[of]).sum(1) for rows, of in parts])
        ranks = projections.argsort(stable=True)
        order = order[ranks[node[ranks].argsort(stable=True)]]
        half = (-(-lengths // size) // 2).clamp_min(1) * size  # whole sets on one side
        half = torch.minimum(half, lengths)
        lengths = torch.stack([half, lengths - half], dim=1).flatten()
        lengths = lengths[lengths > 0]
    return list(torch.split(order, lengths.tolist()))
