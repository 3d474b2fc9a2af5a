"""Which optimizer steps were real, and how far a run has come."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_contrast._checks import fail

_SKIPPED = "_lightning_contrast_skipped_batch"  # attribute of a Trainer: the batch at whose end a step was skipped


class StepWatch:
    """Tells whether an optimizer truly stepped since it was last asked.

    ``trainer.global_step`` also counts steps that a gradient scaler skipped; a hook that the optimizer calls after its
    step does not, but for fused optimizers, which skip inside their step and say so in ``found_inf``.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._stepped = False

    def open(self, optimizers: Sequence[Any]) -> None:
        """Watch these optimizers from now on, and no others.

        Raises:
            TypeError: If one is not a torch optimizer, so that its steps cannot be seen.
        """
        self.close()
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                hint = "Return a torch.optim.Optimizer from `configure_optimizers`"
                fail("optimizer", "be a torch.optim.Optimizer", type(optimizer).__name__, hint, TypeError)
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def close(self) -> None:
        """Watch no optimizer any more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._stepped = [], False

    def take(self) -> bool:
        """Return whether there was a real step since the last call."""
        stepped, self._stepped = self._stepped, False
        return stepped

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler during the step of a fused optimizer
        skipped = isinstance(found_inf, Tensor) and bool(found_inf.item())
        self._stepped = self._stepped or not skipped

    def __reduce__(self) -> tuple[type["StepWatch"], tuple[()]]:
        """Copy and pickle as a watch that is closed: the hooks belong to the optimizers of this process."""
        return StepWatch, ()


def has_gradients(optimizers: Sequence[Optimizer]) -> bool:
    """Tell whether any parameter of the optimizers has a gradient."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return any(p.grad is not None for group in groups for p in group["params"])


def total_steps(trainer: Trainer, pl_module: LightningModule) -> float:
    """Return the number of optimizer steps of the run, or infinity where nothing ends it.

    Under manual optimization, where nobody knows how often the module will step, it is the number of batches; see
    `steps_done`.
    """
    if pl_module.automatic_optimization:
        total = float(trainer.estimated_stepping_batches)
    else:
        epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
        total = math.inf if epochs < 0 else float(trainer.num_training_batches) * epochs
    return total if total >= 0 else math.inf  # Lightning says -1 for a loader of unknown length


def batches_done(trainer: Trainer) -> int:
    """Return how many batches of the whole run came before the present one."""
    return int(trainer.fit_loop.total_batch_idx)


def mark_skipped(trainer: Trainer) -> None:
    """Tell all plug-ins that the optimizer step of the present batch is not to be taken for one."""
    setattr(trainer, _SKIPPED, batches_done(trainer))


def clear_skipped(trainer: Trainer) -> None:
    """Forget which step was skipped: a Trainer may count its batches from the start again."""
    setattr(trainer, _SKIPPED, None)


def step_was_skipped(trainer: Trainer) -> bool:
    """Tell whether `mark_skipped` was called in the present batch."""
    skipped = getattr(trainer, _SKIPPED, None)
    return skipped is not None and skipped == batches_done(trainer)
