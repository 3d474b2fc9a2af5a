"""What a method reads from its Trainer: steps and batch size."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L

from lightning_contrast._checks import fail, require
from lightning_contrast.callbacks._extension import Plan, plan_of
from lightning_contrast.optim import check_warmup


def planned_steps(trainer: L.Trainer, warmup_epochs: int) -> tuple[int, int]:
    """Return the optimizer steps of the warm-up and of the run, as the Trainer plans them.

    Args:
        trainer: The Trainer of a fit that is being set up.
        warmup_epochs: Epochs of the warm-up, >= 0.

    Raises:
        ValueError: If the run has no end, is shorter than its warm-up, or has epochs of unknown length.
    """
    total = trainer.estimated_stepping_batches
    batches = _batches_per_epoch(trainer)
    _set_up_again_on_resume(trainer)
    if not 0 < total < math.inf:
        mend = "Set `max_epochs` or `max_steps` on the Trainer: the schedule needs the end of the run"
        fail("max_epochs", "end the run", trainer.max_epochs, mend)
    if warmup_epochs == 0:
        return 0, int(total)
    mend = "Set `limit_train_batches` on the Trainer, or `warmup_epochs=0`"
    require(batches < math.inf, "warmup_epochs", "be 0 for a loader without a length", warmup_epochs, mend)
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
    plan = plan_of(trainer)
    if plan is None:
        return partial(lr_factor, warmup_steps=warmup_steps, total_steps=total_steps)
    return partial(_extended, lr_factor, plan, warmup_steps, total_steps)


def _extended(lr_factor: Callable[..., float], plan: Plan, warmup_steps: int, total_steps: int, step: int) -> float:
    """Return the factor in a run that is longer than its plan."""
    return lr_factor(plan.at(step, total_steps), min(warmup_steps, plan.total), plan.total)


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
