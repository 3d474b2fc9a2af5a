"""Rules that diagnose a run from the history of the measurements of `CollapseMonitor`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_contrast.callbacks.collapse.model_facts import (
    Facts,
    cause_of_collapse,
    cause_of_dimensional,
    cause_of_prototypes,
)

Record = dict[str, Any]
"""One measurement: "step", "loss", and the values of each space ("features", "projections", "teacher", "scores",
"queue")."""
SPACES = ("projections", "features")
"""Spaces that are checked for collapse; projections first, because the loss acts on them."""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the alarms of `CollapseMonitor`.

    Each lies between the values of healthy runs and of runs that were made to collapse; see ``docs/collapse.md``.
    """

    patience: int = 2
    """Number of consecutive measurements that must meet a condition; the first measurement never counts."""
    std: float = 0.15
    """Complete collapse: mean standard deviation of normalized dimensions times sqrt(D), 1 for rows uniform on the
    sphere, is below this and not rising."""
    shrunk: float = 0.2
    """Complete collapse of a loss without normalization: ``rms`` is below this share of the first measurement's, while
    ``margin`` is below ``shrunk_margin``."""
    shrunk_margin: float = 0.35
    """Maximum ``margin`` of a shrunk space, 0 (views of one image are as different as any) to 1 (equal)."""
    rank_share: float = 0.08
    """Dimensional collapse: effective rank is below this share of the maximum possible rank and below ``rank`` (or is
    below 1.5), and"""
    rank: float = 10.0
    """below this, and"""
    rank_fall: float = 0.3
    """below this share of the largest effective rank so far; features that always had a low rank did not collapse."""
    within_batch_std: float = 0.3
    """Collapse within batches: variance within batches divided by that of rows of several batches is below this."""
    margin: float = 0.02
    """Over-uniformity: ``margin`` is below this, while"""
    uniformity: float = -3.5
    """``uniformity`` (t = 2) is below this."""
    dead_dims: float = 0.5
    """Dead dimensions: share of nearly constant dimensions is above this and above twice the first measurement's."""
    drift: float = 30.0
    """Norm drift: the mean norm has grown or fallen by more than this factor since the first measurement."""
    prototypes: float = 0.03
    """Prototype collapse: effective number of assigned prototypes is below this share of the maximum possible; the
    resulting number is clamped to 1.5..8."""
    uniform_entropy: float = 0.995
    """Uniform collapse: mean entropy of the teacher's probabilities divided by ln K is above this."""
    teacher: float = 0.05
    """Teacher diverged: ``margin`` between student and teacher is below this and not rising."""
    stale: float = 0.2
    """Stale queue: mean cosine similarity of new and stored keys of the same image is below this and not rising."""
    temperature: float = 1.0
    """A temperature above this is reported as the cause of a dimensional collapse."""


@dataclass(frozen=True)
class Finding:
    """An alarm of `CollapseMonitor`."""

    kind: str
    """Kind as listed in ``docs/collapse.md``: "complete collapse", "dimensional collapse", ..."""
    cause: str
    """Likely cause, "" if unknown."""
    space: str
    """Space: "projections", "features", "teacher", "scores" or "queue"."""
    step: int
    """Optimizer step of the measurement."""
    evidence: str
    """Measured values."""
    advice: str
    """What to try."""

    def __str__(self) -> str:
        """Return a sentence with all fields."""
        cause = f" (likely cause: {self.cause})" if self.cause else ""
        return f"{self.kind} of the {self.space}{cause} at step {self.step}: {self.evidence}. {self.advice}."


def diagnose(history: Sequence[Record], facts: Facts, thresholds: Thresholds) -> list[Finding]:
    """Return findings, most severe first.

    Args:
        history: Measurements so far, oldest first.
        facts: Facts of the module.
        thresholds: Thresholds of the alarms.
    """
    broken = list(_not_finite(history, facts, thresholds))
    if broken or len(history) <= thresholds.patience:
        return broken
    severe = [f for rule in (_prototypes, _complete) for f in rule(history, facts, thresholds)]
    rules = (_dimensional, _within, _uniform, _dead, _drift, _teacher, _stale)
    # Other conditions follow from a complete or a prototype collapse, so they are not reported with it.
    return severe or [f for rule in rules for f in rule(history, facts, thresholds)]


def _last(history: Sequence[Record], space: str, name: str, patience: int) -> list[float]:
    """Return the last ``patience`` values of a key, empty if one of them is missing."""
    values = [record.get(space, {}).get(name, math.nan) for record in history[-patience:]]
    return [] if any(math.isnan(value) for value in values) else values


def _values(history: Sequence[Record], space: str, name: str) -> list[float]:
    values = [record.get(space, {}).get(name, math.nan) for record in history]
    return [value for value in values if not math.isnan(value)]


def _not_finite(history: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in SPACES:
        share = history[-1].get(space, {}).get("finite", 1.0)
        if share < 1:
            yield Finding(
                "NaN",
                "",
                space,
                history[-1]["step"],
                f"{1 - share:.0%} of the rows are NaN or infinite",
                "Lower the learning rate, clip gradients, look for a division by a norm of 0, or train in float32",
            )


def _embeddings(facts: Facts) -> tuple[str, ...]:
    """Return the spaces of embeddings; outputs of a distillation head are scores and have rules of their own."""
    return SPACES if facts.center is None else ("features",)


def _complete(history: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in _embeddings(facts):
        values = _last(history, space, "std", t.patience)
        small = bool(values) and max(values) < t.std and values[-1] <= 1.1 * values[0]
        if not small and not _shrunk(history, space, t):
            continue
        last, first = history[-1][space], history[0].get(space, {})
        expected = 1 / math.sqrt(last["width"])
        cause, advice = cause_of_collapse(facts)
        evidence = (
            f"embedding std {last['std'] * expected:.2g}, expected {expected:.2g} on the sphere of {last['width']:.0f} "
            f"dimensions; mean cosine of two images {last['mean_cosine']:.3f}; rms {last['rms']:.2g}, "
            f"{first.get('rms', math.nan):.2g} at step {history[0]['step']}{_loss(history)}"
        )
        yield Finding("complete collapse", cause, space, history[-1]["step"], evidence, advice)
        return  # report a feature collapse only if the projections did not collapse


def _shrunk(history: Sequence[Record], space: str, t: Thresholds) -> bool:
    """Return whether rows approach one point, rather than only getting shorter in unchanged directions."""
    scales, margins = _last(history, space, "rms", t.patience), _last(history, space, "margin", t.patience)
    first = history[0].get(space, {}).get("rms", 0.0)
    return bool(scales) and bool(margins) and max(scales) < t.shrunk * first and max(margins) < t.shrunk_margin


def _prototypes(history: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    used = _last(history, "scores", "prototypes", t.patience)
    entropy = _last(history, "scores", "teacher_entropy", t.patience)
    if not used or not entropy:
        return
    last = history[-1]["scores"]
    numbers = (
        f"all images are assigned to {last['prototypes']:.1f} of {last['possible']:.0f} possible prototypes; mean "
        f"entropy of an image {last['teacher_entropy']:.3f} and entropy of the mean {last['mean_entropy']:.3f} times "
        f"ln K{_loss(history)}"
    )
    if max(used) < min(max(t.prototypes * last["possible"], 1.5), 8.0):
        cause, advice = cause_of_prototypes(facts)
        yield Finding("prototype collapse", cause, "scores", history[-1]["step"], numbers, advice)
    elif facts.center is not None and min(entropy) > t.uniform_entropy and entropy[-1] >= entropy[0]:
        advice = "Sharpen the teacher: lower `teacher_temperature`, or warm it up from a lower value"
        yield Finding("uniform collapse", "no sharpening", "scores", history[-1]["step"], numbers, advice)


def _dimensional(history: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in _embeddings(facts):
        ranks, spread = (_last(history, space, name, t.patience) for name in ("effective_rank", "std"))
        if not ranks or not spread or max(spread) < t.std:
            continue
        last, best = history[-1][space], max(_values(history, space, "effective_rank"))
        possible = min(last["width"], last["rows"] - 1)
        if max(ranks) >= max(min(t.rank_share * possible, t.rank), 1.5) or max(ranks) >= t.rank_fall * best:
            continue
        evidence = (
            f"effective rank {ranks[-1]:.1f} of {possible:.0f} possible (largest so far {best:.1f}), participation "
            f"ratio {last['participation_ratio']:.1f}, RankMe {last['rankme']:.1f}{_loss(history)}"
        )
        cause, advice = cause_of_dimensional(facts, t.temperature)
        yield Finding("dimensional collapse", cause, space, history[-1]["step"], evidence, advice)
        return


def _within(history: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in SPACES:
        values = _last(history, space, "within_batch_std", t.patience)
        if values and max(values) < t.within_batch_std:
            evidence = f"the variance within batches is {values[-1]:.0%} of the variance over several batches"
            advice = (
                "Shuffle the training set; if it is shuffled, BatchNorm statistics identify the batch: use "
                "SyncBatchNorm, shuffled keys, or LayerNorm"
            )
            yield Finding("collapse within batches", "", space, history[-1]["step"], evidence, advice)
            return


def _uniform(history: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    margins = _last(history, "projections", "margin", t.patience)
    spread = _last(history, "projections", "uniformity", t.patience)
    if margins and spread and max(margins) < t.margin and max(spread) < t.uniformity:
        last = history[-1]["projections"]
        evidence = (
            f"uniformity {last['uniformity']:.2f} (minimum -4), but views of one image are as far apart as views of "
            f"two images (cosine {last['positive_cosine']:.3f}, alignment {last['alignment']:.2f})"
        )
        advice = "Weaken the augmentations, check that both views show the same image, or raise the temperature"
        yield Finding("over-uniformity", "", "projections", history[-1]["step"], evidence, advice)


def _dead(history: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in SPACES:
        values = _last(history, space, "dead_dims", t.patience)
        first = _values(history, space, "dead_dims")
        if values and min(values) > t.dead_dims and min(values) > 2 * first[0]:
            evidence = f"{values[-1]:.0%} of the {history[-1][space]['width']:.0f} dimensions are constant"
            advice = "Lower the learning rate or the weight decay, and check for ReLU units that are never active"
            yield Finding("dead dimensions", "", space, history[-1]["step"], evidence, advice)


def _drift(history: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in SPACES:
        values, all_values = _last(history, space, "norm", t.patience), _values(history, space, "norm")
        if not values or all_values[0] <= 0:
            continue
        factors = [max(value, 1e-30) / all_values[0] for value in values]
        if min(factors) > t.drift or max(factors) < 1 / t.drift:
            evidence = f"mean norm {values[-1]:.3g}, {factors[-1]:.3g} times that of the first measurement"
            advice = "Lower the learning rate, add weight decay, or normalize the output of the layer"
            yield Finding("norm drift", "", space, history[-1]["step"], evidence, advice)


def _teacher(history: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    values = _last(history, "teacher", "margin", t.patience)
    if values and max(values) < t.teacher and values[-1] <= values[0]:
        last = history[-1]["teacher"]
        evidence = (
            f"cosine of student and teacher {last['positive_cosine']:.3f} for the same image; margin to different "
            f"images {values[-1]:.3f}"
        )
        advice = "Check that `MomentumUpdate` updates the teacher (`train/momentum`), or lower its momentum"
        yield Finding("teacher diverged", "", "teacher", history[-1]["step"], evidence, advice)


def _stale(history: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    values = _last(history, "queue", "staleness_cosine", t.patience)
    if values and max(values) < t.stale and values[-1] <= values[0]:
        evidence = f"mean cosine of new and stored keys of the same images {values[-1]:.3f}"
        advice = "Lower the momentum of the bank or the learning rate"
        yield Finding("stale queue", "", "queue", history[-1]["step"], evidence, advice)


def _loss(history: Sequence[Record]) -> str:
    """Return the loss as part of the evidence."""
    value = history[-1].get("loss")
    return "" if value is None else f", loss {value:.3f}"
