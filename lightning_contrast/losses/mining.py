"""Which embeddings stand as positives, negatives or neighbours of others: chosen in full precision, no gradient."""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast.precision import full_precision

Miner: TypeAlias = Literal["random", "semi-hard", "hardest"]
MINERS: tuple[Miner, ...] = ("random", "semi-hard", "hardest")


@full_precision
@torch.no_grad()
def nearest_neighbours(queries: Tensor, bank: Tensor, mask: Tensor) -> Tensor:
    """Return the row of a bank that is most similar to each query by cosine, or the query where the bank is empty.

    Args:
        queries: ``(B, D)``.
        bank: ``(K, D)``.
        mask: Which rows of the bank count, ``(K,)`` bool.

    Returns:
        ``(B, D)`` in the queries' dtype (float32 for 16-bit ones).
    """
    rows = F.normalize(bank.to(queries.dtype), dim=1)
    similarity = F.normalize(queries, dim=1) @ rows.T  # (B, K)
    nearest = similarity.masked_fill(~mask, -torch.inf).argmax(1)
    return torch.where(mask.any(), rows[nearest], queries)


def global_classes(labels: Tensor | None, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the class of each row of this rank, ``(B,)``, and of all ranks, in rank order.

    Args:
        labels: ``(B,)``; None makes each image of the global batch a class of its own.
        size: B.
        device: Where the embeddings are.
    """
    if labels is not None:
        return labels, distributed.gather(labels)
    sizes = distributed.batch_sizes(size, device)
    everyone = torch.arange(sum(sizes), device=device)
    start = sum(sizes[: distributed.rank()])
    return everyone[start : start + size], everyone


@full_precision
@torch.no_grad()
def mine(
    anchors: Tensor,
    candidates: Tensor,
    same: Tensor,
    own: Tensor,
    *,
    miner: Miner,
    margin: float = torch.inf,
) -> tuple[Tensor, Tensor]:
    """Choose a positive and a negative for each anchor.

    "random" draws both. "semi-hard" draws the positive and takes the nearest negative that is farther than it by less
    than the margin, or the farthest of all where there is none (https://arxiv.org/abs/1503.03832, section 3.2).
    "hardest" takes the farthest positive and the nearest negative.

    Args:
        anchors: ``(B, D)``, normalised where the distance is to be that of unit vectors.
        candidates: The same of all ranks, ``(N, D)``.
        same: Whether a candidate is of the anchor's class, ``(B, N)`` bool.
        own: Index of the anchor's own image among the candidates, ``(B,)``: the positive where there is no other, and
            the negative where there is none.
        miner: How to choose.
        margin: Of semi-hard negatives, in squared distance.

    Returns:
        Indices of the positives and of the negatives, ``(B,)`` each.
    """
    lengths = anchors.square().sum(1, keepdim=True) + candidates.square().sum(1)
    squared = (lengths - 2 * anchors @ candidates.T).clamp_min(0)  # (B, N)
    if miner == "random":
        positive, negative = _draw(same), _draw(~same)
    elif miner == "hardest":
        positive = squared.masked_fill(~same, -torch.inf).argmax(1)
        negative = squared.masked_fill(same, torch.inf).argmin(1)
    else:
        positive = _draw(same)
        least = squared.gather(1, positive[:, None])
        fits = ~same & (squared > least) & (squared < least + margin)
        farthest = squared.masked_fill(same, -torch.inf).argmax(1)
        nearest = squared.masked_fill(~fits, torch.inf).argmin(1)
        negative = torch.where(fits.any(1), nearest, farthest)
    return positive, torch.where((~same).any(1), negative, own)


def _draw(allowed: Tensor) -> Tensor:
    """Return a random True column of each row of ``(B, N)``."""
    chances = torch.rand(allowed.shape, device=allowed.device)
    return chances.masked_fill(~allowed, -1.0).argmax(1)
