"""Selection of positives and negatives for triplet and pair losses, in full precision and without gradient."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_contrast.precision import full_precision

Miner: TypeAlias = Literal["random", "semi-hard", "hardest"]
MINERS: tuple[Miner, ...] = ("random", "semi-hard", "hardest")


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

    ``"random"`` draws both. ``"semi-hard"`` draws the positive and takes the nearest negative whose squared distance
    exceeds that of the positive by less than the margin, or the farthest negative if there is none (FaceNet,
    https://arxiv.org/abs/1503.03832, section 3.2). ``"hardest"`` takes the farthest positive and the nearest negative.

    Args:
        anchors: Embeddings, ``(B, D)``; normalize them for distances on the unit sphere.
        candidates: Embeddings of all ranks to choose from, ``(N, D)``.
        same: Whether a candidate is of the anchor's class, ``(B, N)`` bool.
        own: Index of the anchor's own image among the candidates, ``(B,)`` integers; chosen as negative if there is
            no candidate of another class.
        miner: One of `MINERS`.
        margin: Margin of semi-hard negatives, in squared distance; > 0.

    Returns:
        Indices of the positives and of the negatives, ``(B,)`` each.
    """
    center = candidates.mean(0)  # distances do not depend on it, but their rounding does
    anchors, candidates = anchors - center, candidates - center
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
    """Draw a random True column of each row of ``(B, N)``."""
    scores = torch.rand(allowed.shape, dtype=torch.float32, device=allowed.device)
    return scores.masked_fill(~allowed, -1.0).argmax(1)
