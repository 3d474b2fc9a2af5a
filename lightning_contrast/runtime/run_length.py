"""What a method reads from its Trainer: steps and batch size."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_contrast import distributed
from lightning_contrast._checks import fail, require
from lightning_contrast.optim import check_warmup
from lightning_contrast.runtime.schedule_position import is_other_length, planned, set_shift, steps_per_epoch

_SHIFT_KEY = "lightning_contrast_shift"  # in a checkpoint


def planned_steps(trainer: L.Trainer, warmup_epochs: int) -> tuple[int, int]:
    """Return the optimizer steps of the warm-up and of the run, as the Trainer plans them.

    Args:
        trainer: The Trainer of a fit that is being set up.
        warmup_epochs: Epochs of the warm-up, >= 0.

    Raises:
        ValueError: If the run has no end, is shorter than its warm-up, or has epochs of unknown length; if ranks have
            different numbers of batches, so that one would wait for the others for ever.
    """
    total = trainer.estimated_stepping_batches
    batches = _batches_per_epoch(trainer)
    hint = "Give each rank as many, as a DistributedSampler does, or set `limit_train_batches` to the smallest number"
    distributed.check_equal("training batches of an epoch", batches, hint, trainer.strategy.root_device)
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
    """Return the factor of the learning rate as a function of the optimizer step.

    Args:
        trainer: The Trainer of a fit that is being set up.
        lr_factor: The method's.
        warmup_steps: Optimizer steps of the warm-up.
        total_steps: Optimizer steps of the run.
    """
    return partial(_factor, trainer, lr_factor, warmup_steps, total_steps)


def _factor(
    trainer: L.Trainer, lr_factor: Callable[..., float], warmup_steps: int, total_steps: int, step: int
) -> float:
    """Return the factor at a step; where the schedules stand is known only once a checkpoint has been read."""
    place, length = planned(trainer, step, total_steps)
    return lr_factor(place, min(warmup_steps, int(length)), int(length))


class FollowsEpochs(L.LightningModule):
    """Lets the schedules of a run that is resumed with epochs of another length go on from the same share of it.

    With twice as many processes an epoch has half the steps. Counted in steps the run would be nearer to its end, or
    farther from it, than it is.
    """

    _shift: int = 0  # as the checkpoint has it, or the run

    def on_train_start(self) -> None:
        """Look how many steps the epochs before have had; the checkpoint is read by now under every strategy."""
        trainer, epochs = self.trainer, self.current_epoch
        self._shift = self._shift if epochs else 0
        steps, done = steps_per_epoch(trainer), trainer.global_step + self._shift
        batches, epoch = trainer.fit_loop.epoch_loop.batch_progress, trainer.fit_loop.epoch_progress.current
        processed: int = epoch.processed  # type: ignore[attr-defined]  # declared as its base class
        within = processed < epoch.ready  # stopped in an epoch, though perhaps after its last batch
        seen = batches.current.ready // trainer.accumulate_grad_batches if within else 0
        if steps is not None and epochs > 0 and self.automatic_optimization and done > seen:
            before = (done - seen) / epochs
            if is_other_length(steps, before):
                self._shift = epochs * steps + seen - trainer.global_step
                _tell(trainer, steps, before)
        set_shift(trainer, self._shift)

    def on_train_end(self) -> None:
        """Leave nothing to the next run of the Trainer."""
        set_shift(self.trainer, 0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where the schedules stand, if that is elsewhere than the steps tell."""
        if self._shift:
            checkpoint[_SHIFT_KEY] = self._shift

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        self._shift = int(checkpoint.get(_SHIFT_KEY, 0))


def _tell(trainer: L.Trainer, steps: int, before: float) -> None:
    """Say that epochs have another length, and what follows."""
    peak = max(group.get("initial_lr", group["lr"]) for group in trainer.optimizers[0].param_groups)
    rank_zero_warn(
        f"An epoch has {steps} optimizer steps; before the checkpoint it had {before:g}. The global batch (per rank x "
        f"ranks x accumulation) is about {before / steps:.3g} times as large, or the data are others. All schedules go "
        f"on from the same share of the run; the peak learning rate stays the checkpoint's {peak:g}, which was chosen "
        f"for its global batch."
    )


def global_batch_size(trainer: L.Trainer) -> int:
    """Return the images of an optimizer step: per rank x ranks x accumulation, read from the train loader.

    Args:
        trainer: The Trainer of a fit that is being set up.

    Raises:
        ValueError: If the loader does not tell its batch size.
    """
    _batches_per_epoch(trainer)
    loader: Any = trainer.train_dataloader
    _set_up_again_on_resume(trainer)
    loader = loader[0] if isinstance(loader, list | tuple) and loader else loader
    batch_size = getattr(loader, "batch_size", None)
    batch_size = batch_size or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(batch_size, int):
        fail("lr", "be given where the loader does not tell its batch size", None, "Pass an absolute `lr`")
    return batch_size * trainer.world_size * trainer.accumulate_grad_batches


def _batches_per_epoch(trainer: L.Trainer) -> float:
    """Set the train loader up and return its length."""
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    return trainer.num_training_batches


def _set_up_again_on_resume(trainer: L.Trainer) -> None:
    """Let Lightning set the loader up once more, after it has read the checkpoint.

    It sets a loader up only once and gives it its saved state then. Optimizers are configured before the loops of the
    checkpoint are read, so a loader that was asked for its length there would begin the epoch again.
    """
    if trainer.ckpt_path is not None:
        trainer.fit_loop._combined_loader = None
