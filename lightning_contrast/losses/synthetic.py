"""Synthetic hard negatives from those in a queue."""

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, fail
from lightning_contrast.losses.checks import check_matrix, check_negatives
from lightning_contrast.precision import full_precision, normalize


@full_precision
@torch.no_grad()
def mochi_negatives(
    query: Tensor,
    negatives: Tensor,
    *,
    hardest: int = 1024,
    pair_mixes: int = 1024,
    query_mixes: int = 128,
    negatives_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Synthesize hard negatives of each query as in MoCHi, for `info_nce(..., extra_negatives=...)`.

    Implements Eq. 3 and 4 of MoCHi (https://arxiv.org/abs/2010.01028): among the negatives that are most similar to a
    query, pairs are mixed with each other, and single negatives with the query, whose share is below one half. The
    negatives are chosen per query. Nothing here receives gradient.

    Args:
        query: Embeddings, ``(B, D)``; L2-normalized here.
        negatives: Queue, ``(K, D)``; L2-normalized here.
        hardest: Number of most similar negatives to draw from, >= 2; N in the paper; limited to K.
        pair_mixes: Number of mixes of two negatives per query, >= 0; s in the paper.
        query_mixes: Number of mixes of a negative with the query per query, >= 0; s' in the paper.
        negatives_mask: Which negatives count, ``(K,)`` bool; False for rows of a queue that are not filled yet. If
            fewer than ``hardest`` count, only those are mixed; at least one must count.
        generator: Random number generator; None uses the global one of torch.

    Returns:
        Unit vectors, ``(B, pair_mixes + query_mixes, D)``.

    Raises:
        ValueError: If shapes do not match or a number is out of range.
        TypeError: If the inputs are not floating point.
    """
    check_matrix("query", query)
    check_negatives(negatives, negatives_mask, query.shape[1])
    check_at_least("hardest", hardest, 2)
    check_at_least("pair_mixes", pair_mixes, 0)
    check_at_least("query_mixes", query_mixes, 0)
    if len(negatives) < 2:
        fail("negatives", "have at least 2 rows", len(negatives), "Wait until the queue has entries")
    query, negatives = normalize(query), normalize(negatives.to(query.dtype))
    similarity = query @ negatives.T  # (B, K)
    if negatives_mask is not None:
        similarity = similarity.masked_fill(~negatives_mask, -torch.inf)
    values, indices = similarity.topk(min(hardest, len(negatives)), dim=1)  # (B, N), hardest first
    filled = (values > -torch.inf).sum(1, keepdim=True).clamp_min(1)  # (B, 1); these come first

    def draw(count: int) -> Tensor:
        """Draw ``(B, count, D)`` from each query's hardest negatives."""
        chance = torch.rand(len(query), count, generator=generator, device=query.device, dtype=query.dtype)
        chosen = torch.minimum((chance * filled).long(), filled - 1)
        return negatives[indices.gather(1, chosen)]

    def share(count: int, most: float) -> Tensor:
        """Draw mixing shares ``(B, count, 1)`` below ``most``."""
        return most * torch.rand(len(query), count, 1, generator=generator, device=query.device, dtype=query.dtype)

    alpha, beta = share(pair_mixes, 1.0), share(query_mixes, 0.5)
    pairs = alpha * draw(pair_mixes) + (1 - alpha) * draw(pair_mixes)
    mixed = beta * query.unsqueeze(1) + (1 - beta) * draw(query_mixes)
    return torch.nn.functional.normalize(torch.cat([pairs, mixed], dim=1), dim=2)
