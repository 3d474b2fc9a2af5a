"""Says in words what is wrong with a run, from the course of what `CollapseMonitor` measured."""

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
"""One measurement: "step", and for each space ("features", "projections", "teacher", "scores", "queue") its numbers."""
SPACES = ("projections", "features")
"""Where collapse is looked for: a loss acts on projections, features follow."""


@dataclass(frozen=True)
class Thresholds:
    """When `CollapseMonitor` gives an alarm. Each was set between runs made to collapse and healthy ones.

    The numbers that they stand between are in ``docs/collapse.md``.
    """

    patience: int = 2
    """Measurements in a row that must show a thing. A first measurement is never one of them."""
    std: float = 0.15
    """Complete collapse: mean deviation of normalised dimensions x sqrt(D), below this and not rising; 1 on the whole
    sphere."""
    shrunk: float = 0.2
    """Complete collapse of a loss that does not normalise: total deviation as a share of the first measurement's, while
    the two views of an image are no closer to each other than ``shrunk_margin``."""
    shrunk_margin: float = 0.35
    """How much closer the views of one image are than those of others, 0 (not at all) to 1 (equal)."""
    rank_share: float = 0.08
    """Dimensional collapse: effective rank of the centred rows below this share of the most possible, or below"""
    rank: float = 10.0
    """this, whichever is less (but 1.5 at least); and"""
    rank_fall: float = 0.3
    """below this share of the largest so far: features that never used more dimensions are poor, not collapsed."""
    within: float = 0.3
    """Collapse within batches: variance inside batches over that of rows of several batches."""
    margin: float = 0.02
    """Over-uniformity: how much closer the views of one image are than those of others, while"""
    uniformity: float = -3.5
    """the spread over the sphere (t = 2) is below this."""
    dead: float = 0.5
    """Dead dimensions: share that hardly vary, and twice the first measurement's."""
    drift: float = 30.0
    """Norm drift: factor by which the mean length has grown or fallen since the first measurement."""
    prototypes: float = 0.03
    """Prototype collapse: effective number of prototypes that win images as a share of the most possible; the number
    itself is kept between 1.5 and 8."""
    uniform_entropy: float = 0.995
    """Collapse to the uniform distribution: mean entropy of the teacher's probabilities as a share of ln K."""
    teacher: float = 0.05
    """Teacher apart: how much closer student and teacher are on one image than on different ones."""
    stale: float = 0.2
    """Stale queue: mean cosine of new and stored keys of the same image."""
    temperature: float = 1.0
    """A temperature above this is named as the cause of a dimensional collapse."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """Its name, one of those in ``docs/collapse.md``: "complete collapse", "dimensional collapse", ..."""
    cause: str
    """The most likely cause in a word or two, "" where nothing points to one."""
    space: str
    """Where it was seen: "projections", "features", "teacher", "scores" or "queue"."""
    step: int
    """The optimizer step at which it was named."""
    evidence: str
    """The numbers."""
    advice: str
    """What to try."""

    def __str__(self) -> str:
        """Return it in words."""
        cause = f" (likely cause: {self.cause})" if self.cause else ""
        return f"{self.kind} of the {self.space}{cause} at step {self.step}: {self.evidence}. {self.advice}."


def diagnose(course: Sequence[Record], facts: Facts, thresholds: Thresholds) -> list[Finding]:
    """Return what is wrong, the gravest first.

    Args:
        course: All measurements so far, oldest first.
        facts: What the module tells of itself.
        thresholds: When to give an alarm.
    """
    broken = list(_not_finite(course, facts, thresholds))
    if broken or len(course) <= thresholds.patience:
        return broken
    gravest = [f for rule in (_prototypes, _complete) for f in rule(course, facts, thresholds)]
    rules = (_dimensional, _within, _uniform, _dead, _drift, _teacher, _stale)
    return gravest or [f for rule in rules for f in rule(course, facts, thresholds)]  # what follows from it is no news


def _lately(course: Sequence[Record], space: str, name: str, patience: int) -> list[float]:
    """Return the last values of a number, none where one of the last measurements lacks it."""
    values = [record.get(space, {}).get(name, math.nan) for record in course[-patience:]]
    return [] if any(math.isnan(value) for value in values) else values


def _all(course: Sequence[Record], space: str, name: str) -> list[float]:
    values = [record.get(space, {}).get(name, math.nan) for record in course]
    return [value for value in values if not math.isnan(value)]


def _not_finite(course: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in SPACES:
        share = course[-1].get(space, {}).get("finite", 1.0)
        if share < 1:
            yield Finding(
                "NaN",
                "",
                space,
                course[-1]["step"],
                f"{1 - share:.0%} of the rows are NaN or infinite",
                "Lower the learning rate, clip gradients, look for a division by a norm of 0, or train in float32",
            )


def _embeddings(facts: Facts) -> tuple[str, ...]:
    """Return the spaces of embeddings: a distillation head's outputs are scores, judged as such."""
    return SPACES if facts.center is None else ("features",)


def _complete(course: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in _embeddings(facts):
        values = _lately(course, space, "std", t.patience)
        small = bool(values) and max(values) < t.std and values[-1] <= 1.1 * values[0]
        if not small and not _shrunk(course, space, t):
            continue
        last, first = course[-1][space], course[0].get(space, {})
        expected = 1 / math.sqrt(last["width"])
        cause, advice = cause_of_collapse(facts)
        evidence = (
            f"embedding std {last['std'] * expected:.2g} of {expected:.2g} expected for {last['width']:.0f} dimensions "
            f"on the sphere, mean cosine of two images {last['mean_cosine']:.3f}, deviation {last['scale']:.2g} after "
            f"{first.get('scale', math.nan):.2g} at step {course[0]['step']}{_loss(course)}"
        )
        yield Finding("complete collapse", cause, space, course[-1]["step"], evidence, advice)
        return  # features that collapsed behind their projections are no news


def _shrunk(course: Sequence[Record], space: str, t: Thresholds) -> bool:
    """Tell whether all rows move to one point, and not only to another length with their directions kept."""
    scales, margins = _lately(course, space, "scale", t.patience), _lately(course, space, "margin", t.patience)
    first = course[0].get(space, {}).get("scale", 0.0)
    return bool(scales) and bool(margins) and max(scales) < t.shrunk * first and max(margins) < t.shrunk_margin


def _prototypes(course: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    used = _lately(course, "scores", "prototypes", t.patience)
    entropy = _lately(course, "scores", "teacher_entropy", t.patience)
    if not used or not entropy:
        return
    last = course[-1]["scores"]
    numbers = (
        f"{last['prototypes']:.1f} of {last['possible']:.0f} possible prototypes win all images; mean entropy of "
        f"an image {last['teacher_entropy']:.3f} and entropy of the mean {last['mean_entropy']:.3f} of "
        f"ln K{_loss(course)}"
    )
    if max(used) < min(max(t.prototypes * last["possible"], 1.5), 8.0):
        cause, advice = cause_of_prototypes(facts)
        yield Finding("prototype collapse", cause, "scores", course[-1]["step"], numbers, advice)
    elif facts.center is not None and min(entropy) > t.uniform_entropy and entropy[-1] >= entropy[0]:
        advice = "Sharpen the teacher: lower `teacher_temperature`, or warm it up from a lower one"
        yield Finding("uniform collapse", "no sharpening", "scores", course[-1]["step"], numbers, advice)


def _dimensional(course: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in _embeddings(facts):
        ranks, spread = (_lately(course, space, name, t.patience) for name in ("effective_rank", "std"))
        if not ranks or not spread or max(spread) < t.std:
            continue
        last, best = course[-1][space], max(_all(course, space, "effective_rank"))
        possible = min(last["width"], last["rows"] - 1)
        if max(ranks) >= max(min(t.rank_share * possible, t.rank), 1.5) or max(ranks) >= t.rank_fall * best:
            continue
        evidence = (
            f"effective rank {ranks[-1]:.1f} of {possible:.0f} possible (largest so far {best:.1f}), participation "
            f"ratio {last['participation_ratio']:.1f}, RankMe {last['rankme']:.1f}{_loss(course)}"
        )
        cause, advice = cause_of_dimensional(facts, t.temperature)
        yield Finding("dimensional collapse", cause, space, course[-1]["step"], evidence, advice)
        return


def _within(course: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in SPACES:
        values = _lately(course, space, "within", t.patience)
        if values and max(values) < t.within:
            evidence = f"images of one batch have {values[-1]:.0%} of the variance of images of several batches"
            advice = (
                "Shuffle the training set; if it is shuffled, the network reads the batch from its BatchNorm "
                "statistics: use SyncBatchNorm or shuffled keys, or LayerNorm"
            )
            yield Finding("collapse within batches", "", space, course[-1]["step"], evidence, advice)
            return


def _uniform(course: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    margins = _lately(course, "projections", "margin", t.patience)
    spread = _lately(course, "projections", "uniformity", t.patience)
    if margins and spread and max(margins) < t.margin and max(spread) < t.uniformity:
        last = course[-1]["projections"]
        evidence = (
            f"uniformity {last['uniformity']:.2f} (limit -4), yet the views of one image are as far apart as those of "
            f"two (cosine {last['positive_cosine']:.3f}, alignment {last['alignment']:.2f})"
        )
        advice = "Weaken the augmentations, check that both views are of the same image, or raise the temperature"
        yield Finding("over-uniformity", "", "projections", course[-1]["step"], evidence, advice)


def _dead(course: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in SPACES:
        values = _lately(course, space, "dead", t.patience)
        first = _all(course, space, "dead")
        if values and min(values) > t.dead and min(values) > 2 * first[0]:
            evidence = f"{values[-1]:.0%} of the {course[-1][space]['width']:.0f} dimensions do not vary"
            advice = "Lower the learning rate or the weight decay, and look at units behind a ReLU that never fire"
            yield Finding("dead dimensions", "", space, course[-1]["step"], evidence, advice)


def _drift(course: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    for space in SPACES:
        values, all_values = _lately(course, space, "norm", t.patience), _all(course, space, "norm")
        if not values or all_values[0] <= 0:
            continue
        factors = [max(value, 1e-30) / all_values[0] for value in values]
        if min(factors) > t.drift or max(factors) < 1 / t.drift:
            evidence = f"mean length {values[-1]:.3g}, {factors[-1]:.3g} times that of the first measurement"
            advice = "Lower the learning rate, add weight decay, or normalise the layer's output"
            yield Finding("norm drift", "", space, course[-1]["step"], evidence, advice)


def _teacher(course: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    values = _lately(course, "teacher", "margin", t.patience)
    if values and max(values) < t.teacher and values[-1] <= values[0]:
        last = course[-1]["teacher"]
        evidence = (
            f"cosine of student and teacher {last['positive_cosine']:.3f} on one image, {values[-1]:.3f} of the way "
            "from different images to agreement"
        )
        advice = "Check that `MomentumUpdate` moves the teacher (`train/momentum`), or lower its momentum"
        yield Finding("teacher apart", "", "teacher", course[-1]["step"], evidence, advice)


def _stale(course: Sequence[Record], facts: Facts, t: Thresholds) -> Iterator[Finding]:
    values = _lately(course, "queue", "staleness_cosine", t.patience)
    if values and max(values) < t.stale and values[-1] <= values[0]:
        evidence = f"new keys have a mean cosine of {values[-1]:.3f} with the stored keys of the same images"
        advice = "Lower the bank's momentum or the learning rate"
        yield Finding("stale queue", "", "queue", course[-1]["step"], evidence, advice)


def _loss(course: Sequence[Record]) -> str:
    """Return the loss as part of a sentence."""
    value = course[-1].get("loss")
    return "" if value is None else f", loss {value:.3f}"
