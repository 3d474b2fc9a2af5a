"""Learning rates as a function of the optimizer step, planned at the start of each fit."""

from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_contrast.optim import constant, scaled_lr
from lightning_contrast.optim.build import OWN_RATE
from lightning_contrast.runtime.run_length import (
    check_end,
    epoch_length_changed,
    epoch_steps,
    global_batch_size,
    measure_run,
    run_length,
    set_up_again_on_resume,
    set_up_training_data,
    warmup_steps,
)
from lightning_contrast.runtime.schedule_position import schedule_position, set_schedule_offset

_OFFSET_KEY = "lightning_contrast_shift"  # in a checkpoint
_BATCH_KEY = "lightning_contrast_global_batch"  # in a checkpoint


class StepSchedule(LambdaLR):
    """Learning rate of every parameter group as a function of the optimizer step.

    Groups with ``"fixed_lr"`` keep their rate, and groups with ``"own_lr"`` their peak rate. The rate of a group that
    was added during the run, as by Lightning's ``BackboneFinetuning``, changes in proportion to the others, from the
    rate that it was added with or was given since.

    Args:
        optimizer: The optimizer.
        factor: Share of the peak rate at an optimizer step.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        groups = optimizer.param_groups
        self.own_rates = [bool(group.get(OWN_RATE, False)) for group in groups]
        super().__init__(optimizer, [constant if group.get("fixed_lr", False) else factor for group in groups])

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group, with those that were added since."""
        rates: list[float | Tensor] = list(super().get_lr())
        added = self.optimizer.param_groups[len(rates) :]
        if added:
            factor = next((factor for factor in self.lr_lambdas if factor is not constant), constant)
            before, now = factor(max(0, self.last_epoch - 1)), factor(self.last_epoch)
            ratio = now / before if before > 0 else 1.0
            rates += [group["lr"] if group.get("fixed_lr", False) else group["lr"] * ratio for group in added]
        return rates

    def replan(self, step: int, ratio: float) -> None:
        """Continue from an optimizer step, with the peak rates multiplied by a ratio, except groups' own.

        Args:
            step: Optimizer steps done, >= 0.
            ratio: Factor of the peak rates, > 0.
        """
        self.last_epoch = step
        pairs = zip(self.base_lrs, self.own_rates, strict=True)
        self.base_lrs = [base if own else base * ratio for base, own in pairs]
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=False):
            rate = base * factor(step)
            group["initial_lr"] = base
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def peak(self) -> float:
        """Return the largest peak rate of the groups that have none of their own."""
        pairs = zip(self.base_lrs, self.own_rates, strict=True)
        return max((float(base) for base, own in pairs if not own), default=0.0)


class ScheduledModule(L.LightningModule):
    """LightningModule whose schedules are planned at the start of each fit, from what the Trainer then is.

    All schedules are functions of one step counter, ``trainer.global_step``, and of one `RunLength`. A learning rate
    that was scaled with the global batch follows a change of that batch. If a run is resumed with epochs of another
    length, the schedules keep their share of the run: with twice as many processes an epoch has half the steps, and
    schedules that count steps only would be at another share of the run than the epochs.
    """

    lr: float | None
    lr_schedule: str | None = None
    lr_factor: Callable[..., float]
    base_lr: ClassVar[float]
    lr_rule: ClassVar[str]
    default_warmup_epochs: ClassVar[int] = 10
    _given_warmup: int | None = None
    _schedule_offset: int = 0  # of the checkpoint or of the run
    _planned_batch: int | None = None  # global batch that the optimizer's peak rates were scaled with
    _saved_batch: int | None = None  # that of the checkpoint that is being loaded
    _warmup_steps: int = 0

    @property
    def warmup_epochs(self) -> int:
        """Epochs of the warm-up: those that were given, else ``default_warmup_epochs``."""
        return self.default_warmup_epochs if self._given_warmup is None else self._given_warmup

    @warmup_epochs.setter
    def warmup_epochs(self, epochs: int | None) -> None:
        self._given_warmup = epochs

    @property
    def peak_lr(self) -> float:
        """Peak learning rate of the run as it was planned last: ``lr``, or that of the method for the global batch."""
        return scaled_lr(self.base_lr, self._planned_batch or 256, self.lr_rule) if self.lr is None else self.lr

    def plan_warmup(self, *, announce: bool = False) -> int:
        """Return the optimizer steps of the warm-up for the run as it was measured last."""
        length, epochs = run_length(self.trainer), self.warmup_epochs
        return warmup_steps(self.trainer, length, epochs, is_default=self._given_warmup is None, announce=announce)

    def plan_learning_rate(self) -> float:
        """Measure the run, plan its warm-up, and return the peak learning rate for its global batch."""
        trainer = self.trainer
        set_up_training_data(trainer)
        length = measure_run(trainer)
        if self.lr_schedule != "constant":
            check_end(trainer, length)
        self._warmup_steps = self.plan_warmup(announce=True)
        self._planned_batch = None
        if trainer.ckpt_path is None:  # what `load_from_checkpoint` has read belongs to another run
            self._saved_batch = None
        lr = self.lr
        if lr is None:
            self._planned_batch = global_batch_size(trainer, length)
            lr = scaled_lr(self.base_lr, self._planned_batch, rule=self.lr_rule)
            rank_zero_info(f"{type(self).__name__}: learning rate {lr:g} for {self._planned_batch} images per step.")
        set_up_again_on_resume(trainer)
        return lr

    def rate_factor(self, step: int) -> float:
        """Return the share of the peak learning rate at an optimizer step of the run."""
        warmup = self._warmup_steps
        if self.lr_schedule == "constant":  # the run may have no end
            return self.lr_factor(step, warmup, warmup + 1) if step < warmup else 1.0
        return factor_at(self.trainer, self.lr_factor, warmup, run_length(self.trainer).total_steps, step)

    def scale_lr(self, ratio: float) -> None:
        """Multiply the peak learning rates by a ratio, but not groups' own; subclasses adapt what depends on them."""
        for schedule in self._schedules():
            schedule.replan(schedule.last_epoch, ratio)

    def on_train_start(self) -> None:
        """Plan all schedules, after the checkpoint was loaded and after other callbacks have changed the run."""
        trainer = self.trainer
        measure_run(trainer)
        rescaled = self._rescale()
        self._align_epochs(rescaled)
        self._warmup_steps = self.plan_warmup()
        if self.automatic_optimization:
            for schedule in self._schedules():
                schedule.replan(trainer.global_step, 1.0)

    def _schedules(self) -> list[StepSchedule]:
        """Return the active schedules; a Tuner or `StochasticWeightAveraging` may have replaced them."""
        found = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return [schedule for schedule in found if isinstance(schedule, StepSchedule)]

    def _rescale(self) -> str:
        """Scale the learning rate with the global batch, if it has changed since it was scaled last; return a note."""
        planned, self._saved_batch = self._saved_batch or self._planned_batch, None
        schedules = self._schedules()
        peak = max((schedule.peak() for schedule in schedules), default=0.0)
        if self.lr is not None or planned is None or not schedules:
            return f"the peak learning rate remains the checkpoint's {peak:g}, which was chosen for its global batch."
        now = global_batch_size(self.trainer, run_length(self.trainer))
        self._planned_batch = now
        if now != planned:
            ratio = scaled_lr(1.0, now, self.lr_rule) / scaled_lr(1.0, planned, self.lr_rule)
            self.scale_lr(ratio)
            rank_zero_info(
                f"{type(self).__name__}: the learning rate is scaled from {peak:g} to {peak * ratio:g}, from a global "
                f"batch of {planned} to {now} images."
            )
        return "the peak learning rate follows the global batch."

    def _align_epochs(self, rate_note: str) -> None:
        """Compare the steps of the previous epochs with the current epoch length."""
        trainer, epochs, length = self.trainer, self.current_epoch, run_length(self.trainer)
        self._schedule_offset = self._schedule_offset if epochs else 0
        done = trainer.global_step + self._schedule_offset
        batches, epoch = trainer.fit_loop.epoch_loop.batch_progress, trainer.fit_loop.epoch_progress.current
        processed: int = epoch.processed  # type: ignore[attr-defined]  # declared as its base class
        within = processed < epoch.ready  # stopped within an epoch, possibly after its last batch
        seen = batches.current.ready // length.accumulated(epochs) if within else 0
        steps = epoch_steps(trainer, epochs) if epochs > 0 else None
        if steps is not None and self.automatic_optimization and done > seen:
            before = (done - seen) / epochs
            if epoch_length_changed(steps, before):
                self._schedule_offset = int(length.steps_of(epochs)) + seen - trainer.global_step
                rank_zero_warn(
                    f"An epoch has {steps:g} optimizer steps; before the checkpoint it had {before:g}. The global "
                    f"batch (per rank x ranks x accumulation) is about {before / steps:.3g} times as large, or the "
                    f"dataset has changed. All schedules continue from the same share of the run; {rate_note}"
                )
        set_schedule_offset(trainer, self._schedule_offset)

    def on_train_end(self) -> None:
        """Remove the offset from the Trainer, which may be reused."""
        set_schedule_offset(self.trainer, 0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the offset of the schedules and the global batch of the learning rate, if there are any."""
        if self._schedule_offset:
            checkpoint[_OFFSET_KEY] = self._schedule_offset
        if self._planned_batch is not None:
            checkpoint[_BATCH_KEY] = self._planned_batch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the offset of the schedules and the global batch of the learning rate."""
        self._schedule_offset = int(checkpoint.get(_OFFSET_KEY, 0))
        self._saved_batch = checkpoint.get(_BATCH_KEY)


def factor_at(
    trainer: L.Trainer, lr_factor: Callable[..., float], warmup_steps: int, total_steps: float, step: int
) -> float:
    """Return the learning rate factor at an optimizer step of the run, at its position in the schedules.

    Args:
        trainer: The Trainer.
        lr_factor: The method's function of the step, the warm-up steps and the total steps.
        warmup_steps: Optimizer steps of the warm-up.
        total_steps: Optimizer steps of the run.
        step: Optimizer step of the run, >= 0.
    """
    position, length = schedule_position(trainer, step, total_steps)
    return lr_factor(position, min(warmup_steps, int(length)), int(length))
