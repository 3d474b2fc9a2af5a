"""Strengths of views that change over a run."""

import math
from dataclasses import dataclass
from typing import Literal

from lightning_contrast._checks import check_at_least, check_choice, check_positive, check_probability, fail, require


@dataclass(frozen=True)
class StrengthSchedule:
    """A curriculum: the strength of the views as a function of the optimizer step.

    ``start + (end - start) k / K`` at step k of K, or along half a cosine; constant after that. Give it to
    `ViewAugmentation` as ``strength=``; see `ViewPolicy.set_strength` for what a strength does.

    Args:
        start: Strength at step 0, in 0..1.
        end: Strength at step K and later, in 0..1.
        epochs: Length in epochs, >= 1; it must fit into the run. None, also for ``steps``: the whole run.
        steps: Length K in optimizer steps instead, >= 1; it must fit into the run.
        shape: ``"linear"`` or ``"cosine"``.

    Raises:
        ValueError: If a number is out of its range, or both lengths are given.

    Example:
        >>> schedule = StrengthSchedule(0.2, 1.0, steps=100)
        >>> [round(schedule(step, 100), 6) for step in (0, 50, 100, 101)]
        [0.2, 0.6, 1.0, 1.0]
    """

    start: float = 0.0
    end: float = 1.0
    epochs: int | None = None
    steps: int | None = None
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_probability("start", self.start, "It is a share of the policy's strength")
        check_probability("end", self.end, "It is a share of the policy's strength")
        for name, length in (("epochs", self.epochs), ("steps", self.steps)):
            if length is not None:
                check_at_least(name, length, 1)
        both = self.epochs is not None and self.steps is not None
        require(not both, "steps", "be left out if `epochs` is given", self.steps, "Give one of both, or none")
        check_choice("shape", self.shape, ("linear", "cosine"))

    def __call__(self, step: float, length: float) -> float:
        """Return the strength, in 0..1.

        Args:
            step: Optimizer step k, >= 0.
            length: Length K in optimizer steps, > 0.
        """
        check_positive("length", length)
        progress = min(step / length, 1.0)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


def check_strength(strength: object) -> None:
    """Check a strength: a number in 0..1, a `StrengthSchedule`, or a function of the optimizer step.

    Raises:
        ValueError: If it is a number out of its range.
        TypeError: If it is something else.
    """
    if isinstance(strength, bool) or not (isinstance(strength, int | float) or callable(strength)):
        hint = "Give a number, `augment.StrengthSchedule(0.2, 1.0)` or a function of the step that returns a number"
        fail("strength", "be a number, a schedule or a function", type(strength).__name__, hint, TypeError)
    if isinstance(strength, int | float):
        check_probability("strength", strength, "It is a share of the policy's strength")
