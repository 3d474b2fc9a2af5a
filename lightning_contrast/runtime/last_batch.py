"""Size of the last batch of an epoch, as far as it is known before the epoch."""

from typing import Any

from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_contrast._checks import require


def check_last_batch(trainer: Any) -> None:
    """Refuse a training loader whose last batch would have one image, which no method can compare with others.

    Only a loader of known length is judged, and only if the run reads its last batch. Ranks join their batches.

    Args:
        trainer: The Trainer at the start of training.

    Raises:
        ValueError: If there is such a batch.
    """
    if trainer.world_size > 1:
        return
    for loader in tree_leaves(trainer.train_dataloader):
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            continue
        batches = loader.batch_sampler
        if type(batches) is not BatchSampler or batches.drop_last or batches.batch_size == 1:
            continue
        rows = len(batches.sampler)  # type: ignore[arg-type]  # a sampler of a map-style dataset has a length
        reached = trainer.num_training_batches >= len(batches)
        steps = trainer.max_steps
        ends_before = steps != -1 and steps * trainer.accumulate_grad_batches < len(batches)
        hint = f"Set `drop_last=True`, or another batch size: the last of {len(batches)} batches has one image"
        rest = rows % batches.batch_size
        require(
            rest != 1 or not reached or ends_before,
            "batch_size",
            f"not divide {rows} images with a rest of 1",
            batches.batch_size,
            hint,
        )
