"""How similar the views of an image are, beside those of other images: the numbers of `ContrastMonitor`."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast import distributed

Values = dict[str, tuple[Tensor, Tensor]]
"""A value for each anchor, and whether it counts, by name."""


def against_batch(
    view_a: Tensor, view_b: Tensor, temperature: Tensor | None, labels: Tensor | None, hardest: int
) -> dict[str, Tensor]:
    """Compare each embedding of this rank with those of all other images on all ranks, in both views.

    Args:
        view_a: (B, D); L2-normalised here.
        view_b: (B, D), row i of the same image; L2-normalised here.
        temperature: A scalar, or None.
        labels: (B,), -1 for none; or None.
        hardest: Negatives looked at for false ones.

    Returns:
        Means over all ranks, by name; see `ContrastMonitor`.
    """
    a, b = F.normalize(view_a.float(), dim=1), F.normalize(view_b.float(), dim=1)
    sizes = distributed.batch_sizes(len(a), a.device)
    start, total = sum(sizes[: distributed.rank()]), sum(sizes)
    candidates = torch.cat([distributed.gather(a, sizes), distributed.gather(b, sizes)])  # (2N, D)
    anchors = torch.cat([a, b])
    own = torch.arange(start, start + len(a), device=a.device).repeat(2)  # the image of each anchor
    positive = (a * b).sum(dim=1).repeat(2)
    same_image = torch.arange(total, device=a.device).repeat(2).unsqueeze(0) == own.unsqueeze(1)
    cosines = (anchors @ candidates.T).masked_fill(same_image, -math.inf)
    values = _values(positive, cosines, ~same_image, temperature)
    if labels is not None and len(labels) == len(a) and total > 1:
        of_all = distributed.gather(labels.to(a.device), sizes).repeat(2)
        mine, known = labels.to(a.device).repeat(2).unsqueeze(1), (labels >= 0).to(a.device).repeat(2)
        false = (of_all.unsqueeze(0) == mine) & ~same_image
        nearest = cosines.topk(min(hardest, 2 * total - 2), dim=1).indices
        values["false_negatives"] = (false.gather(1, nearest).float().mean(dim=1), known)
        values["false_negatives_chance"] = (false.float().sum(dim=1) / (2 * total - 2), known)
    return _means(values)


def against_queue(
    query: Tensor, key: Tensor, queue: Tensor, mask: Tensor, temperature: Tensor | None
) -> dict[str, Tensor]:
    """Compare queries with their keys and the keys of a queue.

    Args:
        query: (B, D); L2-normalised here.
        key: (B, D); L2-normalised here.
        queue: (K, D); L2-normalised here.
        mask: (K,), False where the queue is not filled yet.
        temperature: A scalar, or None.

    Returns:
        Means over all ranks, by name; see `ContrastMonitor`.
    """
    q, k, n = (F.normalize(x.float(), dim=1) for x in (query, key, queue.to(query.device)))
    valid = mask.to(query.device).unsqueeze(0).expand(len(q), -1)
    cosines = (q @ n.T).masked_fill(~valid, -math.inf)
    return _means(_values((q * k).sum(dim=1), cosines, valid, temperature))


def _values(positive: Tensor, cosines: Tensor, valid: Tensor, temperature: Tensor | None) -> Values:
    """Return a value for each anchor, and whether it counts."""
    negatives = valid.sum(dim=1)
    some = negatives > 0
    everywhere = torch.ones_like(some)
    values = {
        "positive_cosine": (positive, everywhere),
        "negative_cosine": (cosines.masked_fill(~valid, 0.0).sum(dim=1) / negatives, some),
        "top1": ((positive > cosines.amax(dim=1)).float(), some),
    }
    if temperature is None:
        return values
    logits = cosines / temperature
    every = torch.cat([(positive / temperature).unsqueeze(1), logits], dim=1)
    loss = every.logsumexp(dim=1) - positive / temperature
    limit = (negatives + 1).float().log()
    effective = torch.special.entr(logits.masked_fill(~some.unsqueeze(1), 0.0).softmax(dim=1)).sum(dim=1).exp()
    return values | {
        "loss": (loss, some),
        "bound": (limit - loss, some),
        "bound_limit": (limit, some),
        "effective_negatives": (effective, some),
        "effective_negatives_share": (effective / negatives, some),
    }


def _means(values: Values) -> dict[str, Tensor]:
    """Return the mean of each value over the anchors of all ranks that count, NaN where there are none."""
    sums = torch.stack([torch.where(counts, value, 0.0).double().sum() for value, counts in values.values()])
    counts = torch.stack([counted.sum().double() for _, counted in values.values()])
    sums, counts = distributed.all_reduce_sum(torch.stack([sums, counts]))
    return dict(zip(values, (sums / counts).float(), strict=True))
