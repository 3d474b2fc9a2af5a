"""Statistics of one space of features: spread, rank, and similarity of views."""

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast import distributed
from lightning_contrast.metrics.spectrum import RANKME_EPSILON, entropy_rank, power_law, squared_singular_values
from lightning_contrast.metrics.sphere import uniformity_of

Entry = dict[str, Tensor]
"""Rows of one batch by name, each ``(..., R, D)``."""


class RollingBuffer:
    """Buffer of the entries of the last batches; the second-to-last dimension of each tensor indexes images.

    Args:
        batches: Maximum number of entries.
    """

    def __init__(self, batches: int) -> None:
        self._entries: deque[Entry] = deque(maxlen=batches)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Add the entry of one batch; the oldest one is dropped if the buffer is full."""
        self._entries.append(entry)

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()

    def names(self) -> set[str]:
        """Return the names that are part of every entry."""
        return set.intersection(*(set(entry) for entry in self._entries)) if self._entries else set()

    def gathered(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the rows of all batches and ranks, and the index of the batch of each row; a collective operation.

        Args:
            name: One of `names`; its tensors are ``(..., R, D)`` and may differ in R only.

        Returns:
            Rows ``(N, ..., D)`` and batch indices ``(N,)``; batches of different ranks have different indices.
        """
        parts = [entry[name].movedim(-2, 0) for entry in self._entries]
        rows = torch.cat(parts)
        number = [i * distributed.world_size() + distributed.rank() for i in range(len(parts))]
        sizes = torch.tensor([len(part) for part in parts])
        batches = torch.tensor(number).repeat_interleave(sizes).to(rows.device)
        return distributed.gather(rows), distributed.gather(batches)

    def state(self) -> list[list[Entry]]:
        """Return the entries of all ranks on the CPU; a collective operation."""
        own = [{name: value.detach().cpu() for name, value in entry.items()} for entry in self._entries]
        if not distributed.is_distributed():
            return [own]
        everyone: list[Any] = [None] * distributed.world_size()
        torch.distributed.all_gather_object(everyone, own)
        return everyone

    def restore(self, state: list[list[Entry]], device: torch.device) -> None:
        """Restore this rank's entries from a state; the buffer stays empty if the number of ranks has changed."""
        self.clear()
        if len(state) == distributed.world_size():
            for entry in state[distributed.rank()]:
                self.add({name: value.to(device) for name, value in entry.items()})


DEAD = 1e-3
"""A dimension is dead if its standard deviation is below this share of the root mean square over dimensions."""
MIN_ROWS = 8
"""Minimum number of finite rows of a measurement."""


def measure_buffer(buffer: RollingBuffer) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Measure the entries of all ranks; a collective operation with equal results on all ranks.

    Args:
        buffer: Entries with "features" ``(R, F)`` and optionally "projections" and "teacher" ``(V, R, D)``, "winners"
            and "entropies" ``(R, 1)``, "mean" ``(1, K)``, "keys" ``(2, R, D)``.

    Returns:
        The values of each space; singular values of "features" and "projections" on the CPU; and their rows.
    """
    names = buffer.names()
    record: dict[str, Any] = {}
    spectra: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}
    for space in [name for name in ("features", "projections") if name in names]:
        rows, batches = buffer.gathered(space)
        views = rows if rows.ndim == 3 else rows.unsqueeze(1)  # (N, V, D)
        record[space], spectrum = measure(views[:, 0], batches)
        record[space] |= {"width": float(views.shape[2]), "rows": float(len(views))}
        spectra[space], taken[space] = spectrum.float().cpu(), views[:, 0]
        if views.shape[1] > 1:
            record[space] |= measure_pairs(views[:, 0], views[:, 1])
        if space == "projections" and "teacher" in names:
            teacher, _ = buffer.gathered("teacher")
            if teacher.shape[2] == views.shape[2]:
                record["teacher"] = measure_pairs(views[:, 0], teacher[:, -1])
    if {"winners", "entropies", "mean"} <= names:
        winners, entropies, mean = (buffer.gathered(name)[0] for name in ("winners", "entropies", "mean"))
        record["scores"] = measure_scores(winners[:, 0], entropies[:, 0], mean.mean(dim=0))
    if "keys" in names:
        keys, _ = buffer.gathered("keys")
        record["queue"] = {"staleness_cosine": measure_pairs(keys[:, 0], keys[:, 1])["positive_cosine"]}
    return record, spectra, taken


def measure(rows: Tensor, batches: Tensor) -> tuple[dict[str, float], Tensor]:
    """Return statistics of a sample of features, and its singular spectrum.

    Args:
        rows: Features, float32, ``(N, D)``.
        batches: Index of the batch of each row, integer, ``(N,)``.

    Returns:
        The statistics by name, and the singular values of the rows, largest first; the latter are empty, and only
        ``finite`` is given, if fewer than 8 rows are finite. ``finite``: share of finite rows. ``std``: mean standard
        deviation of the dimensions of normalized rows, times sqrt(D); 1 for rows uniform on the sphere.
        ``mean_cosine``: over all pairs. ``rankme``: of the rows without centering. ``effective_rank``,
        ``participation_ratio``, ``alpha_req``: of centered rows. ``uniformity``: with t = 2. ``dead_dims``: share of
        nearly constant dimensions. ``within_batch_std``: variance within batches divided by that of all rows. ``norm``:
        mean norm. ``rms``: root mean square distance from the mean row.
    """
    finite = rows.isfinite().all(dim=1)
    share = float(finite.float().mean()) if len(rows) else 0.0
    if share < 1:
        rows, batches = rows[finite], batches[finite]
    if len(rows) < MIN_ROWS:
        return {"finite": share}, rows.new_empty(0)
    count, width = rows.shape
    unit = F.normalize(rows, dim=1)
    centered = rows - rows.mean(dim=0)
    variances = centered.double().square().mean(dim=0)
    squared, covariance = squared_singular_values(rows), squared_singular_values(rows, center=True)
    shares = covariance / covariance.sum().clamp(min=1e-300)
    rms = variances.mean().sqrt()
    values = {
        "std": unit.std(dim=0, correction=0).mean() * math.sqrt(width),
        "mean_cosine": (unit.double().sum(dim=0).square().sum() - count) / (count * (count - 1)),
        "rankme": entropy_rank(squared.sqrt(), RANKME_EPSILON),
        "effective_rank": entropy_rank(covariance.sqrt()),
        "participation_ratio": torch.nan_to_num(1 / shares.square().sum(), posinf=0.0),
        "alpha_req": power_law(covariance, count, _fit_range(min(count - 1, width))),
        "uniformity": uniformity_of(unit),
        "dead_dims": (variances.sqrt() <= DEAD * rms).double().mean(),
        "within_batch_std": _within_batches(rows, batches, variances.sum() * count / (count - 1)),
        "norm": rows.norm(dim=1).mean(),
        "rms": variances.sum().sqrt(),
    }
    host = torch.stack([value.double().to(rows.device) for value in values.values()]).tolist()  # one synchronization
    return {"finite": share} | dict(zip(values, host, strict=True)), squared.sqrt()


def _fit_range(rank: int) -> tuple[int, int]:
    """Return the range of eigenvalues for alpha-ReQ; it starts at the first if there are few."""
    return (5, 100) if rank >= 20 else (1, 100)


def _within_batches(rows: Tensor, batches: Tensor, total: Tensor) -> Tensor:
    """Return the variance within batches divided by the total variance, a scalar; about 1 for random batches."""
    _, index, sizes = torch.unique(batches, return_inverse=True, return_counts=True)
    means = rows.new_zeros(len(sizes), rows.shape[1]).index_add_(0, index, rows) / sizes.unsqueeze(1)
    inside = (rows - means[index]).double().square().sum()
    freedom = (sizes - 1).sum()
    return inside / freedom.clamp(min=1) / total.clamp(min=1e-300) if len(sizes) > 1 else torch.ones_like(total)


def measure_pairs(view_a: Tensor, view_b: Tensor) -> dict[str, float]:
    """Return similarity statistics of two views of the same images.

    Args:
        view_a: Embeddings, ``(N, D)``; L2-normalized here.
        view_b: Embeddings of the same images, ``(N, D)``; L2-normalized here.

    Returns:
        ``alignment``: mean squared distance on the sphere, 0..4. ``positive_cosine``: mean cosine of positive pairs.
        ``margin``: (``positive_cosine`` - mean cosine of other pairs) / (1 - mean cosine of other pairs).
    """
    a, b = F.normalize(view_a, dim=1).double(), F.normalize(view_b, dim=1).double()
    positive = (a * b).sum(dim=1).mean()
    others = (a.sum(dim=0) @ b.sum(dim=0) - (a * b).sum()) / max(len(a) * (len(a) - 1), 1)
    margin = (positive - others) / (1 - others).clamp(min=1e-12)
    host = torch.stack([2 - 2 * positive, positive, margin]).tolist()
    return dict(zip(("alignment", "positive_cosine", "margin"), host, strict=True))


def measure_scores(winners: Tensor, entropies: Tensor, mean: Tensor) -> dict[str, float]:
    """Return statistics of the assignment of images to K prototypes.

    Args:
        winners: Prototype with the largest probability for each image, ``(N,)``.
        entropies: Entropy of the probabilities of each image, in nats, ``(N,)``.
        mean: Mean probabilities, ``(K,)``.

    Returns:
        ``prototypes``: effective number of prototypes that are assigned; ``prototype_use``: the same divided by
        ``possible``, which is min(N, K); ``teacher_entropy`` and ``mean_entropy``: mean of the entropies and entropy of
        the mean, divided by ln K.
    """
    count, width = len(winners), len(mean)
    wins = torch.zeros(width, dtype=torch.float64, device=winners.device)
    wins.index_add_(0, winners, torch.ones(count, dtype=torch.float64, device=winners.device))
    used = torch.special.entr(wins / count).sum().exp()
    log = math.log(width)
    host = torch.stack(
        [used, used / min(count, width), entropies.double().mean() / log, torch.special.entr(mean.double()).sum() / log]
    ).tolist()
    values = dict(zip(("prototypes", "prototype_use", "teacher_entropy", "mean_entropy"), host, strict=True))
    return values | {"possible": float(min(count, width))}
