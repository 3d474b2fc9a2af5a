"""Lightning's finetuning callbacks, which freeze layers at the start and add them to the optimizer later."""

from typing import Any

from lightning.pytorch.callbacks import BaseFinetuning

from lightning_contrast._checks import require


def prepare_finetuning(trainer: Any) -> None:
    """Check the finetuning callbacks of a Trainer, and continue to train what they had unfrozen before a resume.

    On a resume Lightning freezes the layers again and restores their parameter groups, but it unfreezes them only in
    the epoch in which they are added: without this they would stay frozen for the rest of the run.

    Args:
        trainer: The Trainer at the start of training.

    Raises:
        ValueError: If there are several ranks: DDP does not average the gradients of parameters that were frozen when
            it wrapped the module, so that the ranks would train different weights.
    """
    found = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, BaseFinetuning)]
    if not found:
        return
    hint = "Use one device, or `resuming.HeadWarmup(epochs)`, which works on several"
    ranks = trainer.world_size
    require(ranks == 1, found[0], "run on one rank, because others would not get its gradients", ranks, hint)
    if trainer.ckpt_path is not None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(True)
