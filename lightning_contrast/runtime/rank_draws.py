"""Random draws that differ between ranks."""

from typing import Any

import lightning as L
import torch

from lightning_contrast import distributed
from lightning_contrast.seeding import derived_seed


class RestoreDraws(L.Callback):
    """Restores the global generators after an exception in a step, whose draws have generators of their own.

    Lightning tells only callbacks of an exception. A process that catches it, such as a notebook, would continue with
    generators that differ between ranks.
    """

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Restore the generators."""
        pl_module.rank_draws.close()


def rank_seed() -> int | None:
    """Return a seed that differs between ranks, drawn from torch's global CPU generator; None on a single rank.

    Views, masks and noise have to differ between ranks. After ``seed_everything`` the global generators of all ranks
    are equal, and a sampler may rely on that, so they stay as they are and the draws of a step have generators of their
    own. A single rank draws from the global generators.
    """
    if not distributed.is_distributed():
        return None
    return derived_seed(int(torch.randint(2**62, ())), distributed.rank())
