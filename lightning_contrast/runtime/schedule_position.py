"""Schedule position for extended runs and changed epoch lengths."""

from dataclasses import dataclass
from typing import Any

_EXTENSION, _OFFSET = "_lightning_contrast_extension", "_lightning_contrast_offset"  # attributes of a Trainer
RAMP_SHARE = 0.1
"""Share of the added steps in which the schedules of a finished run move back from their end."""


@dataclass(frozen=True)
class ScheduleExtension:
    """Maps the steps of a longer run to those of the original schedules, without a jump at the checkpoint.

    From a checkpoint in the middle of a run, the remaining part of the original schedules is stretched over the
    remaining steps of the longer run. From the end of a run, where the learning rate is spent, the schedules first move
    back linearly, in a tenth of the added steps, to the position of a run that was planned with the new length, and
    then forward to their end again.

    Args:
        done: Optimizer steps at the checkpoint.
        total: Planned optimizer steps of the original run, >= ``done``.
    """

    done: int
    total: int

    def at(self, step: float, end: float) -> float:
        """Return the position in the original schedules.

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


def set_extension(trainer: Any, extension: ScheduleExtension | None) -> None:
    """Set the extension of all schedules of a Trainer, or remove it."""
    setattr(trainer, _EXTENSION, extension)


def extension_of(trainer: Any) -> ScheduleExtension | None:
    """Return the extension of a Trainer whose run was extended, else None."""
    extension = getattr(trainer, _EXTENSION, None)
    return extension if isinstance(extension, ScheduleExtension) else None


def schedule_position(trainer: Any, step: float, total: float) -> tuple[float, float]:
    """Return the current position in the schedules and their length, both in optimizer steps.

    Args:
        trainer: The Trainer.
        step: Optimizer step of the run.
        total: Optimizer steps of the run, as the Trainer estimates them: epochs times steps per epoch.
    """
    extension, step = extension_of(trainer), step + schedule_offset(trainer)
    return (step, total) if extension is None else (extension.at(step, total), extension.total)


def schedule_offset(trainer: Any) -> int:
    """Return by how many optimizer steps all schedules are ahead of the run; see `set_schedule_offset`."""
    return int(getattr(trainer, _OFFSET, 0))


def set_schedule_offset(trainer: Any, offset: int) -> None:
    """Set by how many optimizer steps all schedules are ahead of the run; negative if they are behind."""
    setattr(trainer, _OFFSET, offset)
