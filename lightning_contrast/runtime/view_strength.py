"""Strengths of views that depend on the position of a run."""

import math
from collections.abc import Callable
from typing import Any

from lightning_contrast._checks import check_probability, fail, require
from lightning_contrast.augment.curriculum import StrengthSchedule
from lightning_contrast.runtime.run_length import check_end, is_trial, run_length
from lightning_contrast.runtime.schedule_position import schedule_offset, schedule_position


def strength_at(trainer: Any, strength: float | StrengthSchedule | Callable[[int], float] | None) -> float:
    """Return the strength of the current optimizer step; nothing is read from a device.

    Args:
        trainer: The Trainer, in training.
        strength: A number, a schedule, or a function of the step.

    Raises:
        ValueError: If a function returns a number outside 0..1.
        TypeError: If it returns something else.
    """
    if isinstance(strength, StrengthSchedule):
        length = strength_length(trainer, strength)
        if strength.epochs is None and strength.steps is None:
            return strength(*schedule_position(trainer, trainer.global_step, length))
        return strength(trainer.global_step + schedule_offset(trainer), length)
    value = strength(trainer.global_step) if callable(strength) else strength
    if not isinstance(value, int | float):
        fail("strength", "return a number", type(value).__name__, "Convert it with `float(...)`", TypeError)
    check_probability("strength", value, "It is a share of the policy's strength")
    return value


def strength_length(trainer: Any, schedule: StrengthSchedule) -> float:
    """Return the length of a curriculum in optimizer steps.

    Args:
        trainer: The Trainer, whose training loader is set up.
        schedule: The curriculum.

    Raises:
        ValueError: If it is longer than the run, or has no length in a run without an end.
    """
    run = run_length(trainer)
    if schedule.epochs is None and schedule.steps is None:
        check_end(trainer, run)
        return run.total_steps
    length = float(schedule.steps or 0) if schedule.epochs is None else run.steps_of(schedule.epochs)
    hint = "Give `steps`, or set `limit_train_batches` on the Trainer"
    require(math.isfinite(length), "epochs", "be left out for a loader without a length", schedule.epochs, hint)
    if not _is_short(trainer):
        name, given = ("epochs", schedule.epochs) if schedule.epochs is not None else ("steps", schedule.steps)
        rule = f"fit into the {run.total_steps:g} steps of the run"
        value = given if name == "steps" else f"{given} epochs of {length / (given or 1):g} steps"
        hint = "Shorten the curriculum, or train longer (`max_epochs` or `max_steps` of the Trainer)"
        require(length <= run.total_steps, name, rule, value, hint)
    return length


def check_strength_fits(trainer: Any, schedule: StrengthSchedule) -> None:
    """Raise a ValueError if a curriculum has more epochs or steps than the Trainer, before the data are known."""
    hint = "Shorten the curriculum, or train longer"
    limits = (("epochs", schedule.epochs, trainer.max_epochs), ("steps", schedule.steps, trainer.max_steps))
    for name, given, limit in limits:
        ends = limit not in (None, -1) and not _is_short(trainer)
        fits = given is None or not ends or given <= limit
        require(fits, name, f"be at most {limit}, the `max_{name}` of the Trainer", given, hint)


def _is_short(trainer: Any) -> bool:
    """Return whether this is a trial run, shorter than what it tries."""
    return bool(trainer.fast_dev_run) or is_trial(trainer)
