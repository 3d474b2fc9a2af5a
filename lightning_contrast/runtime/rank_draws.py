"""Random draws that differ between ranks."""

import torch

from lightning_contrast import distributed
from lightning_contrast.seeding import derived_seed


def rank_seed() -> int | None:
    """Return a seed that differs between ranks, drawn from torch's global CPU generator; None on a single rank.

    Views, masks and noise have to differ between ranks. After ``seed_everything`` the global generators of all ranks
    are equal, and a sampler may rely on that, so they stay as they are and the draws of a step have generators of their
    own. A single rank draws from the global generators.
    """
    if not distributed.is_distributed():
        return None
    return derived_seed(int(torch.randint(2**62, ())), distributed.rank())
