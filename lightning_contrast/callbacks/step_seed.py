"""Random numbers that depend on the position in a run only."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_contrast._checks import check_at_least
from lightning_contrast.seeding import derived_seed, seed_everything


class StepSeed(Callback):
    """Make every random draw of a training step a function of (seed, epoch, batch, rank).

    At the start of each training batch the global generators of Python, NumPy and torch (CPU and all accelerators) are
    seeded, so that a stopped and resumed run draws the same numbers as an uninterrupted run, without generator states
    in the checkpoint. `ViewAugmentation` without its own seed uses this one.

    Samplers keep working: at the start of each epoch the generators are seeded with (seed, epoch), alike on all ranks,
    so a sampler that draws its order from them gets a new and common state. The order of the first epoch after a start
    or a resume is drawn before that. An exact resume therefore needs a sampler whose order depends on the epoch only,
    such as those of this package's data modules and DistributedSampler; and within an epoch a loader with
    ``state_dict`` and ``load_state_dict``.

    Args:
        seed: Base of all seeds, >= 0.

    Attributes:
        provides_view_seed: The seed, read by `ViewAugmentation`.

    Raises:
        TypeError: If the seed is not a whole number.
        ValueError: If the seed is below 0.
    """

    def __init__(self, seed: int) -> None:
        check_at_least("seed", seed, 0)
        self.provides_view_seed = seed

    @property
    def seed(self) -> int:
        """Base of all seeds."""
        return self.provides_view_seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed all ranks alike, before the loader of the epoch creates its iterator."""
        seed_everything(derived_seed(self.seed, trainer.current_epoch))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the generators for the step."""
        seed_everything(derived_seed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))
