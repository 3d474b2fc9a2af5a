"""Detection of real optimizer steps, and the progress of a run in steps and batches."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_contrast._checks import fail
from lightning_contrast.runtime.run_length import measure_run

_SKIPPED = "_lightning_contrast_skipped_batch"  # attribute of a Trainer: the batch at whose end a step was skipped


class StepDetector:
    """Detects whether an optimizer really stepped since the last query.

    ``trainer.global_step`` also counts steps that a gradient scaler skipped. A post-step hook of the optimizer is not
    called for those, except by fused optimizers, which skip inside their step and set ``found_inf``.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._has_stepped = False

    def attach(self, optimizers: Sequence[Any]) -> None:
        """Register hooks on these optimizers, and remove those on all others.

        Raises:
            TypeError: If one is not a torch optimizer, which has no such hooks.
        """
        self.detach()
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                hint = "Return a torch.optim.Optimizer from `configure_optimizers`"
                fail("optimizer", "be a torch.optim.Optimizer", type(optimizer).__name__, hint, TypeError)
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._has_stepped = [], False

    def stepped(self) -> bool:
        """Return whether there was a real step since the last call, and reset."""
        has_stepped, self._has_stepped = self._has_stepped, False
        return has_stepped

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler during the step of a fused optimizer
        skipped = isinstance(found_inf, Tensor) and bool(found_inf.item())
        self._has_stepped = self._has_stepped or not skipped

    def __reduce__(self) -> tuple[type["StepDetector"], tuple[()]]:
        """Copy and pickle without hooks, which belong to the optimizers of this process."""
        return StepDetector, ()


def has_gradients(optimizers: Sequence[Optimizer]) -> bool:
    """Return whether any parameter of the optimizers has a gradient."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return any(p.grad is not None for group in groups for p in group["params"])


def total_steps(trainer: Trainer, pl_module: LightningModule) -> float:
    """Return the number of optimizer steps of the run, infinity for an endless run.

    Under manual optimization, where the number of steps is unknown, it is the number of batches; see `batches_done`.
    """
    length = measure_run(trainer)
    if pl_module.automatic_optimization:
        return length.total_steps
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    return math.inf if epochs < 0 else length.batches * epochs


def only_forward(trainer: Trainer) -> bool:
    """Return whether the current batch is only run forward, without an optimizer step.

    `StochasticWeightAveraging` passes over the training data so to update the statistics of BatchNorm.
    """
    return bool(trainer.fit_loop._skip_backward)


def batches_done(trainer: Trainer) -> int:
    """Return the number of batches of the whole run before the current one."""
    return int(trainer.fit_loop.total_batch_idx)


def mark_skipped(trainer: Trainer) -> None:
    """Mark the optimizer step of the current batch as skipped, for all callbacks."""
    setattr(trainer, _SKIPPED, batches_done(trainer))


def clear_skipped(trainer: Trainer) -> None:
    """Remove the mark of `mark_skipped`: another fit may count its batches from 0."""
    setattr(trainer, _SKIPPED, None)


def step_was_skipped(trainer: Trainer) -> bool:
    """Return whether `mark_skipped` was called in the current batch."""
    skipped = getattr(trainer, _SKIPPED, None)
    return skipped is not None and skipped == batches_done(trainer)
