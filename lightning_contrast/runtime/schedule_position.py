"""Where the schedules of a run stand that is made longer, or goes on with epochs of another length."""

import math
from dataclasses import dataclass
from typing import Any

_PLAN, _SHIFT = "_lightning_contrast_plan", "_lightning_contrast_shift"  # attributes of a Trainer
_SAME = 0.1  # an epoch that differs by less has lost some steps, as to a gradient scaler
RAMP_SHARE = 0.1  # of the added steps: the way back from the end of the schedules


@dataclass(frozen=True)
class SchedulePlan:
    """The steps of a longer run as steps of the old one, without a jump at the checkpoint.

    From a checkpoint on the way the rest of the old schedules is stretched over the rest of the new run. From the end
    of a run, where a learning rate is spent, the schedules first go back, in a line over a tenth of the added steps, to
    where a run that had been planned so long would stand, and then forward to their end again.

    Args:
        done: Optimizer steps at the checkpoint.
        total: Optimizer steps that the old run was planned for, >= ``done``.
    """

    done: int
    total: int

    def at(self, step: float, end: float) -> float:
        """Return the step of the old plan at which the schedules stand.

        Args:
            step: Optimizer step of the longer run, >= 0.
            end: Optimizer steps of the longer run, > ``done``.
        """
        if step <= self.done:
            return step
        added = end - self.done
        since = min(step - self.done, added)
        if self.done < self.total:
            return self.done + since * (self.total - self.done) / added
        back = self.total * self.done / end
        ramp = min(max(1.0, RAMP_SHARE * added), added / 2)
        if since <= ramp:
            return self.total + (back - self.total) * since / ramp
        return back + (self.total - back) * (since - ramp) / (added - ramp)


def set_plan(trainer: Any, plan: SchedulePlan | None) -> None:
    """Give a Trainer a plan for all its schedules, or take it away."""
    setattr(trainer, _PLAN, plan)


def plan_of(trainer: Any) -> SchedulePlan | None:
    """Return the plan of a Trainer whose run was extended."""
    plan = getattr(trainer, _PLAN, None)
    return plan if isinstance(plan, SchedulePlan) else None


def planned(trainer: Any, step: float, total: float) -> tuple[float, float]:
    """Return where the schedules stand, and how long they are.

    Args:
        trainer: The Trainer.
        step: Optimizer step of the run.
        total: Optimizer steps of the run, as the Trainer estimates them: epochs times steps of an epoch.
    """
    plan, step = plan_of(trainer), step + shift_of(trainer)
    return (step, total) if plan is None else (plan.at(step, total), plan.total)


def steps_per_epoch(trainer: Any) -> int | None:
    """Return the optimizer steps of an epoch, or None where the schedules do not count epochs.

    Args:
        trainer: The Trainer of a fit that has begun.
    """
    counts = trainer.max_epochs not in (None, -1) and trainer.max_steps == -1
    if not counts or not math.isfinite(trainer.num_training_batches):
        return None
    steps: int = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    return steps


def is_other_length(steps: int, before: float) -> bool:
    """Tell whether an epoch is longer or shorter than before, by more than a few skipped steps.

    Args:
        steps: Optimizer steps of an epoch, >= 1.
        before: The mean of the epochs before.
    """
    return abs(before - steps) > _SAME * steps


def shift_of(trainer: Any) -> int:
    """Return how many optimizer steps later than the run has made all schedules stand; see `set_shift`."""
    return int(getattr(trainer, _SHIFT, 0))


def set_shift(trainer: Any, shift: int) -> None:
    """Let all schedules stand ``shift`` optimizer steps later than the run has made."""
    setattr(trainer, _SHIFT, shift)
