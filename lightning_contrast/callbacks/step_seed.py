"""Random numbers that depend on where a run is, not on how it got there."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_contrast._checks import check_at_least
from lightning_contrast.seeding import derived_seed, seed_everything


class StepSeed(Callback):
    """Makes every random draw of a training step a function of (seed, epoch, batch, rank).

    At the start of each training batch the global generators of Python, NumPy and torch (the CPU's and every
    accelerator's) are seeded, so that a run that is stopped and resumed draws what the uninterrupted run draws, with no
    generator in the checkpoint. `ViewAugmentation` without a seed of its own takes this one.

    Samplers are not disturbed: at the start of each epoch the generators are seeded with (seed, epoch) alike on all
    ranks, so a sampler that draws its order from them finds a new and common state. The order of the first epoch after
    a start or a resume is drawn before that. An exact resume therefore needs a sampler whose order depends on the epoch
    only, as those of our data modules and DistributedSampler do; and within an epoch a loader with ``state_dict`` and
    ``load_state_dict``.

    Args:
        seed: The base of all seeds; >= 0.

    Attributes:
        provides_view_seed: The seed, where `ViewAugmentation` finds it.

    Raises:
        TypeError: If the seed is not a whole number.
        ValueError: If it is below 0.
    """

    def __init__(self, seed: int) -> None:
        check_at_least("seed", seed, 0)
        self.provides_view_seed = seed

    @property
    def seed(self) -> int:
        """The base of all seeds."""
        return self.provides_view_seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give all ranks the same generators before the loader of the epoch makes its iterator."""
        seed_everything(derived_seed(self.seed, trainer.current_epoch))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        seed_everything(derived_seed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))
