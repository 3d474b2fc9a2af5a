"""Retrieval measures: revisited Oxford and Paris, images and texts, Winoground."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_not_negative, fail, require
from lightning_contrast.metrics.neighbours import check_features

SETUPS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Which images are positive and which are ignored, by the name of the setup."""


def revisited_map(
    queries: Tensor,
    gallery: Tensor,
    ground_truth: Sequence[Mapping[str, Sequence[int]]],
    *,
    k: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[str, Any]]:
    """Compute the retrieval measures of the revisited Oxford and Paris benchmarks.

    Source: https://arxiv.org/abs/1803.11285 and its code. Images are ranked by cosine similarity, ignored ones are
    taken out of the ranking, and average precision is an area by trapezoids (not scikit-learn's step function).
    Queries without positives are left out of the means.

    Args:
        queries: Features ``(Q, F)``, floating; L2-normalized here.
        gallery: Features ``(N, F)``, floating; L2-normalized here.
        ground_truth: For each query the rows of the gallery that are ``"easy"``, ``"hard"`` and ``"junk"``.
        k: Ranks of the precision at k.

    Returns:
        For ``"easy"``, ``"medium"`` and ``"hard"`` a dict of ``"map"``; ``"aps"``, the average precision of each query,
        None without positives; and ``"mp_at"``, the mean precision by k, where k ends at the last positive. In 0..1;
        the means are NaN if no query has positives.

    Raises:
        ValueError: If shapes do not match or a row of the gallery does not exist.
    """
    check_features("queries", queries)
    check_features("gallery", gallery)
    widths = (queries.shape[1], gallery.shape[1])
    require(widths[0] == widths[1], "queries", "be as wide as `gallery`", widths, "Use features of the same layer")
    hint = "Give a dict of easy, hard and junk rows per query"
    require(len(ground_truth) == len(queries), "ground_truth", f"hold {len(queries)} dicts", len(ground_truth), hint)
    for number in k:
        check_at_least("k", number, 1)
    similarity = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    ranking = similarity.argsort(dim=1, descending=True, stable=True).cpu()
    found = {}
    for setup, (positive, ignored) in SETUPS.items():
        rows = [
            _positive_ranks(order, truth, positive, ignored) for order, truth in zip(ranking, ground_truth, strict=True)
        ]
        aps = [_average_precision(ranks) if len(ranks) else None for ranks in rows]
        known = [ranks for ranks in rows if len(ranks)]
        count = len(known) or float("nan")
        found[setup] = {
            "map": sum(ap for ap in aps if ap is not None) / count,
            "aps": aps,
            "mp_at": {number: sum(_precision_at(ranks, number) for ranks in known) / count for number in k},
        }
    return found


def image_text_recall(images: Tensor, texts: Tensor, text_image: Tensor, *, k: int | Sequence[int]) -> dict[str, float]:
    """Compute the recall at k of images by texts and of texts by images, with several texts per image.

    As in CLIP's benchmark code: a text finds its one image; an image is a hit if any of its texts is found.
    `metrics.RetrievalRecall` is for one text per image, and counts ties as a random draw.

    Args:
        images: Features ``(N, F)``, floating; L2-normalized here.
        texts: Features ``(M, F)``, floating; L2-normalized here.
        text_image: Row of the image of each text, ``(M,)``, integers in 0..N - 1; each image has a text.
        k: Number of retrieved rows per query, or several.

    Returns:
        ``image_at_{k}``, the share of texts that find their image, and ``text_at_{k}``, the share of images that find a
        text of theirs; in 0..1.

    Raises:
        ValueError: If shapes do not match, an index is out of range, an image has no text or k is too large.
    """
    check_features("images", images)
    check_features("texts", texts)
    widths = (images.shape[1], texts.shape[1])
    require(widths[0] == widths[1], "texts", "be as wide as `images`", widths, "Use embeddings of one space")
    whole = text_image.shape == (len(texts),) and not text_image.is_floating_point()
    got = f"{tuple(text_image.shape)} {text_image.dtype}"
    require(whole, "text_image", f"be integers of shape ({len(texts)},)", got, "Give the image of each text")
    present = sorted(set(text_image.tolist()))
    every = present == list(range(len(images)))
    require(every, "text_image", f"name each of 0..{len(images) - 1}", present[:8], "Leave out images without a text")
    numbers: Sequence[int] = [k] if isinstance(k, int) else list(k)
    similarity = F.normalize(texts.double(), dim=1) @ F.normalize(images.double(), dim=1).T  # (M, N)
    found: dict[str, float] = {}
    for number in numbers:
        check_at_least("k", number, 1)
        limit = min(len(images), len(texts))
        require(number <= limit, "k", f"be <= {limit}, the number of rows", number, "Decrease `k`")
        by_text = (similarity.topk(number, dim=1).indices == text_image.unsqueeze(1)).any(1)
        rows = text_image[similarity.T.topk(number, dim=1).indices]  # (N, k), the images of the texts found
        by_image = (rows == torch.arange(len(images), device=rows.device).unsqueeze(1)).any(1)
        found |= {f"image_at_{number}": float(by_text.double().mean())}
        found |= {f"text_at_{number}": float(by_image.double().mean())}
    return found


def winoground_scores(scores: Tensor, *, tie: float = 0.0) -> dict[str, float]:
    """Compute the three scores of Winoground (https://arxiv.org/abs/2204.03162); a tie counts as wrong.

    Args:
        scores: Similarity of each caption (rows) and image (columns) of an item, ``(N, 2, 2)``; caption i belongs to
            image i.
        tie: Similarities that differ by no more are equal, >= 0. A text tower without word order gives both captions
            one embedding up to rounding, of which each is right in half of the items if 0.

    Returns:
        ``text``: each image prefers its caption; ``image``: each caption prefers its image; ``group``: both. Shares in
        0..1; chance is 1/4, 1/4 and 1/6.

    Raises:
        ValueError: If the shape is another, there are no items or ``tie`` is negative.
    """
    check_not_negative("tie", tie)
    fits = scores.ndim == 3 and scores.shape[1:] == (2, 2) and len(scores) > 0
    require(fits, "scores", "be (N, 2, 2), N >= 1", tuple(scores.shape), "Give caption by image for each item")
    own, swapped = scores.diagonal(dim1=1, dim2=2), scores.flip(1).diagonal(dim1=1, dim2=2)  # by image, (N, 2)
    text = (own - swapped > tie).all(1)
    image = (own - swapped.flip(1) > tie).all(1)
    shares = {"text": text, "image": image, "group": text & image}
    return {name: float(right.double().mean()) for name, right in shares.items()}


def _positive_ranks(
    order: Tensor, truth: Mapping[str, Sequence[int]], positive: Sequence[str], ignored: Sequence[str]
) -> list[int]:
    """Return the ranks of the positives, from 0, in a ranking ``(N,)`` from which the ignored rows are taken out."""
    marks = torch.zeros(len(order), dtype=torch.int8)
    for names, mark in ((positive, 1), (ignored, -1)):
        for name in names:
            rows = [int(row) for row in truth.get(name, ())]
            if any(not 0 <= row < len(order) for row in rows):
                fail("ground_truth", f"name rows in 0..{len(order) - 1}", rows, "Check the gallery")
            marks[rows] = mark
    ordered = marks[order]
    kept = ordered[ordered >= 0]
    return [int(rank) for rank in kept.nonzero().flatten()]


def _average_precision(ranks: Sequence[int]) -> float:
    """Return the area under the curve of precision and recall by trapezoids."""
    area = 0.0
    for found, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else found / rank
        area += (before + (found + 1) / (rank + 1)) / (2 * len(ranks))
    return area


def _precision_at(ranks: Sequence[int], k: int) -> float:
    """Return the precision among the first k images, or up to the last positive if that is earlier."""
    limit = min(k, ranks[-1] + 1)
    return sum(rank < limit for rank in ranks) / limit
