"""The numbers of one space of features: its spread, its dimensions, its views."""

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


class RollingBuffer:
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


DEAD = 1e-3
"""A dimension whose deviation is below this share of the root mean square of all is dead."""
ENOUGH = 8
"""Rows that a measurement needs."""


def measure_buffer(buffer: RollingBuffer) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Measure what the reservoirs of all ranks hold; every rank must call it and gets the same.

    Args:
        buffer: Entries with "features" (R, F) and maybe "projections" and "teacher" (V, R, D), "winners" and
            "entropies" (R, 1), "mean" (1, K), "keys" (2, R, D).

    Returns:
        The numbers of each space by name; the singular values of "features" and "projections" on the CPU; their rows.
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
    """Return the numbers of a sample of features, and its singular spectrum.

    Args:
        rows: Features ``(N, D)``, float32.
        batches: Which batch each row is from, ``(N,)``, integer.

    Returns:
        The numbers by name, and the singular values of the features as they are, largest first (empty where fewer than
        8 rows are finite). ``finite``: share of rows without NaN. ``std``: mean deviation of the dimensions of the
        normalised rows, times sqrt(D); 1 on the whole sphere. ``mean_cosine``: of all pairs. ``rankme``: of the rows
        as they are. ``effective_rank``, ``participation_ratio``, ``alpha_req``: of the centred rows. ``uniformity``:
        t = 2. ``dead``: share of dimensions that hardly vary. ``within``: variance inside a batch over that of all
        rows. ``norm``: mean length. ``scale``: root of the total variance.
    """
    finite = rows.isfinite().all(dim=1)
    share = float(finite.float().mean()) if len(rows) else 0.0
    if share < 1:
        rows, batches = rows[finite], batches[finite]
    if len(rows) < ENOUGH:
        return {"finite": share}, rows.new_empty(0)
    count, width = rows.shape
    unit = F.normalize(rows, dim=1)
    centred = rows - rows.mean(dim=0)
    variances = centred.double().square().mean(dim=0)
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
        "dead": (variances.sqrt() <= DEAD * rms).double().mean(),
        "within": _within(rows, batches, variances.sum() * count / (count - 1)),
        "norm": rows.norm(dim=1).mean(),
        "scale": variances.sum().sqrt(),
    }
    host = torch.stack([value.double().to(rows.device) for value in values.values()]).tolist()  # one wait for all
    return {"finite": share} | dict(zip(values, host, strict=True)), squared.sqrt()


def _fit_range(rank: int) -> tuple[int, int]:
    """Return alpha-ReQ's range, from the first eigenvalue on where there are not many."""
    return (5, 100) if rank >= 20 else (1, 100)


def _within(rows: Tensor, batches: Tensor, total: Tensor) -> Tensor:
    """Return the variance inside batches as a share of the total; about 1 for random batches."""
    _, index, sizes = torch.unique(batches, return_inverse=True, return_counts=True)
    means = rows.new_zeros(len(sizes), rows.shape[1]).index_add_(0, index, rows) / sizes.unsqueeze(1)
    inside = (rows - means[index]).double().square().sum()
    freedom = (sizes - 1).sum()
    return inside / freedom.clamp(min=1) / total.clamp(min=1e-300) if len(sizes) > 1 else torch.ones_like(total)


def measure_pairs(view_a: Tensor, view_b: Tensor) -> dict[str, float]:
    """Return what two views of the same images have in common.

    Args:
        view_a: ``(N, D)``.
        view_b: ``(N, D)``.

    Returns:
        ``alignment``: mean squared distance on the sphere, 0..4. ``positive_cosine``: mean cosine of the pairs.
        ``margin``: how far that is above the mean cosine of other pairs, as a share of the possible.
    """
    a, b = F.normalize(view_a, dim=1).double(), F.normalize(view_b, dim=1).double()
    positive = (a * b).sum(dim=1).mean()
    others = (a.sum(dim=0) @ b.sum(dim=0) - (a * b).sum()) / max(len(a) * (len(a) - 1), 1)
    margin = (positive - others) / (1 - others).clamp(min=1e-12)
    host = torch.stack([2 - 2 * positive, positive, margin]).tolist()
    return dict(zip(("alignment", "positive_cosine", "margin"), host, strict=True))


def measure_scores(winners: Tensor, entropies: Tensor, mean: Tensor) -> dict[str, float]:
    """Return how images are assigned to K prototypes.

    Args:
        winners: The prototype with the largest probability of each image, ``(N,)``.
        entropies: Of each image's probabilities, ``(N,)``, in nats.
        mean: The mean probabilities ``(K,)``.

    Returns:
        ``prototypes``: effective number of prototypes that win an image; ``prototype_use``: the same as a share of
        the most that is possible, min(N, K); ``teacher_entropy`` and ``mean_entropy``: mean entropy of an image's
        probabilities and entropy of the mean, as shares of ln K; ``possible``: min(N, K).
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
