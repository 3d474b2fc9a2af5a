"""Length of a run: steps, warm-up, global batch size, and schedules after a change of the epoch length."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_contrast import distributed
from lightning_contrast._checks import fail, require
from lightning_contrast.optim import check_warmup
from lightning_contrast.runtime.schedule_position import (
    epoch_length_changed,
    schedule_position,
    set_schedule_offset,
    steps_per_epoch,
)

_OFFSET_KEY = "lightning_contrast_shift"  # in a checkpoint


def planned_steps(trainer: L.Trainer, warmup_epochs: int) -> tuple[int, int]:
    """Return the optimizer steps of the warm-up and of the run, as estimated by the Trainer.

    Args:
        trainer: The Trainer, during the setup of a fit.
        warmup_epochs: Epochs of the warm-up, >= 0.

    Raises:
        ValueError: If the run is endless, shorter than its warm-up, or has epochs of unknown length; if ranks have
            different numbers of batches, which would cause a deadlock.
    """
    total = trainer.estimated_stepping_batches
    batches = _batches_per_epoch(trainer)
    hint = (
        "Use a DistributedSampler, which gives each rank as many, or set `limit_train_batches` to the smallest number"
    )
    distributed.check_equal("training batches per epoch", batches, hint, trainer.strategy.root_device)
    _set_up_again_on_resume(trainer)
    if not 0 < total < math.inf:
        hint = "Set `max_epochs` or `max_steps` on the Trainer: the schedule needs the end of the run"
        fail("max_epochs", "end the run", trainer.max_epochs, hint)
    if warmup_epochs == 0:
        return 0, int(total)
    hint = "Set `limit_train_batches` on the Trainer, or `warmup_epochs=0`"
    require(batches < math.inf, "warmup_epochs", "be 0 for a loader without a length", warmup_epochs, hint)
    warmup = warmup_epochs * math.ceil(batches / trainer.accumulate_grad_batches)
    check_warmup(warmup, int(total))
    return warmup, int(total)


def rate_factor(
    trainer: L.Trainer, lr_factor: Callable[..., float], warmup_steps: int, total_steps: int
) -> Callable[[int], float]:
    """Return the learning rate factor as a function of the optimizer step.

    Args:
        trainer: The Trainer, during the setup of a fit.
        lr_factor: The method's function of the step, the warm-up steps and the total steps.
        warmup_steps: Optimizer steps of the warm-up.
        total_steps: Optimizer steps of the run.
    """
    return partial(_factor, trainer, lr_factor, warmup_steps, total_steps)


def _factor(
    trainer: L.Trainer, lr_factor: Callable[..., float], warmup_steps: int, total_steps: int, step: int
) -> float:
    """Return the factor at a step; the schedule position is known only after a checkpoint was loaded."""
    position, length = schedule_position(trainer, step, total_steps)
    return lr_factor(position, min(warmup_steps, int(length)), int(length))


class EpochScheduledModule(L.LightningModule):
    """LightningModule whose schedules keep their share of the run if it is resumed with epochs of another length.

    With twice as many processes an epoch has half the steps. Schedules that count steps only would then be at another
    share of the run than the epochs.
    """

    _schedule_offset: int = 0  # of the checkpoint or of the run

    def on_train_start(self) -> None:
        """Compare the steps of the previous epochs with the current epoch length, after the checkpoint was loaded."""
        trainer, epochs = self.trainer, self.current_epoch
        self._schedule_offset = self._schedule_offset if epochs else 0
        steps, done = steps_per_epoch(trainer), trainer.global_step + self._schedule_offset
        batches, epoch = trainer.fit_loop.epoch_loop.batch_progress, trainer.fit_loop.epoch_progress.current
        processed: int = epoch.processed  # type: ignore[attr-defined]  # declared as its base class
        within = processed < epoch.ready  # stopped within an epoch, possibly after its last batch
        seen = batches.current.ready // trainer.accumulate_grad_batches if within else 0
        if steps is not None and epochs > 0 and self.automatic_optimization and done > seen:
            before = (done - seen) / epochs
            if epoch_length_changed(steps, before):
                self._schedule_offset = epochs * steps + seen - trainer.global_step
                _warn_of_epoch_length(trainer, steps, before)
        set_schedule_offset(trainer, self._schedule_offset)

    def on_train_end(self) -> None:
        """Remove the offset from the Trainer, which may be reused."""
        set_schedule_offset(self.trainer, 0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the offset of the schedules, if there is one."""
        if self._schedule_offset:
            checkpoint[_OFFSET_KEY] = self._schedule_offset

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the offset of the schedules."""
        self._schedule_offset = int(checkpoint.get(_OFFSET_KEY, 0))


def _warn_of_epoch_length(trainer: L.Trainer, steps: int, before: float) -> None:
    peak = max(group.get("initial_lr", group["lr"]) for group in trainer.optimizers[0].param_groups)
    rank_zero_warn(
        f"An epoch has {steps} optimizer steps; before the checkpoint it had {before:g}. The global batch (per rank x "
        f"ranks x accumulation) is about {before / steps:.3g} times as large, or the dataset has changed. All "
        f"schedules continue from the same share of the run; the peak learning rate remains the checkpoint's {peak:g}, "
        f"which was chosen for its global batch."
    )


def global_batch_size(trainer: L.Trainer) -> int:
    """Return the images per optimizer step: batch size of the training loader x ranks x accumulation.

    Args:
        trainer: The Trainer, during the setup of a fit.

    Raises:
        ValueError: If the loader has no batch size.
    """
    _batches_per_epoch(trainer)
    loader: Any = trainer.train_dataloader
    _set_up_again_on_resume(trainer)
    loader = loader[0] if isinstance(loader, list | tuple) and loader else loader
    batch_size = getattr(loader, "batch_size", None)
    batch_size = batch_size or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(batch_size, int):
        fail("lr", "be given if the loader has no batch size", None, "Pass an absolute `lr`")
    return batch_size * trainer.world_size * trainer.accumulate_grad_batches


def _batches_per_epoch(trainer: L.Trainer) -> float:
    """Set up the training loader and return its length."""
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    return trainer.num_training_batches


def _set_up_again_on_resume(trainer: L.Trainer) -> None:
    """Make Lightning set up the loader again after it has loaded the checkpoint.

    Lightning restores the state of a loader at its first setup only. Optimizers are configured before the loop state is
    loaded, so a loader that was set up there for its length would restart the epoch.
    """
    if trainer.ckpt_path is not None:
        trainer.fit_loop._combined_loader = None
