"""Nearest neighbors by cosine similarity, and the weighted k-NN vote."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_positive, require
from lightning_contrast.precision import full_precision

CHUNK_ELEMENTS = 1 << 25
"""Similarities in memory at a time if no chunk size is given: 128 MiB in float32. Smaller products are slower."""

EPSILON = 1e-5
"""Added to Euclidean distances before their inverse is the weight of a vote."""

GROUP = 4
"""Columns per group of the tournament in `top_k`."""
ROWS = 64
"""Rows per tournament: few enough that its maxima stay in the processor's cache."""


def nearest_neighbours(
    queries: Tensor, bank: Tensor, k: int, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` most similar rows of the bank for each query, most similar first.

    Args:
        queries: Features ``(Q, F)``, floating; L2-normalized here.
        bank: Features ``(N, F)``, floating; L2-normalized here.
        k: Number of neighbors per query, 1 to N.
        chunk_size: Queries per chunk, which bounds memory; None chooses it. The result does not depend on it.

    Returns:
        Cosine similarities ``(Q, k)`` in float32, and row indices in the bank ``(Q, k)``. Among rows of equal
        similarity the order is not specified.

    Raises:
        ValueError: If shapes do not match or ``k`` is outside 1..N.
    """
    check_features("queries", queries)
    check_features("bank", bank)
    widths = (queries.shape[1], bank.shape[1])
    require(widths[0] == widths[1], "queries", "be as wide as `bank`", widths, "Use features of the same layer")
    check_at_least("k", k, 1)
    require(k <= len(bank), "k", f"be <= {len(bank)}, the number of rows in the bank", k, "Decrease `k` or add rows")
    if chunk_size is not None:
        check_at_least("chunk_size", chunk_size, 1)
    return search(queries, F.normalize(bank.float(), dim=1), k, chunk_size=chunk_size)


def search(queries: Tensor, bank: Tensor, k: int, *, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Find the nearest neighbors as `nearest_neighbours` does, in a bank that is already normalized.

    Args:
        queries: Features ``(Q, F)``, floating; L2-normalized here.
        bank: Features ``(N, F)``, float32, L2-normalized.
        k: Number of neighbors per query, 1 to N.
        chunk_size: Queries per chunk; None chooses it.

    Returns:
        Cosine similarities ``(Q, k)`` in float32, and row indices in the bank ``(Q, k)``.
    """
    rows = max(1, CHUNK_ELEMENTS // len(bank)) if chunk_size is None else chunk_size
    similarities = bank.new_empty((len(queries), k))
    indices = torch.empty((len(queries), k), dtype=torch.int64, device=bank.device)
    buffer = bank.new_empty((min(rows, len(queries)), len(bank)))  # reused by every chunk
    for start in range(0, len(queries), rows):
        chunk = F.normalize(queries[start : start + rows].float(), dim=1)
        part = slice(start, start + len(chunk))
        similarities[part], indices[part] = top_k(torch.mm(chunk, bank.T, out=buffer[: len(chunk)]), k)
    return similarities, indices


def search_euclidean(queries: Tensor, bank: Tensor, k: int, *, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Find the rows of the bank with the smallest Euclidean distance to each query.

    Args:
        queries: Features ``(Q, F)``, floating.
        bank: Features ``(N, F)``, floating.
        k: Number of neighbors per query, 1 to N.
        chunk_size: Queries per chunk; None chooses it.

    Returns:
        Similarities 1 / (distance + 1e-5), as in solo-learn's ``WeightedKNNClassifier``, ``(Q, k)`` in float32, and row
        indices in the bank ``(Q, k)``.
    """
    rows = max(1, CHUNK_ELEMENTS // len(bank)) if chunk_size is None else chunk_size
    found = [
        torch.cdist(chunk.float(), bank.float(), compute_mode="donot_use_mm_for_euclid_dist").topk(k, largest=False)
        for chunk in torch.split(queries, rows)
    ]
    distances, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return 1 / (distances + EPSILON), indices


@full_precision
@torch.no_grad()
def nearest_row(queries: Tensor, bank: Tensor, mask: Tensor) -> Tensor:
    """Look up the row of a partly filled bank that is most similar to each query, without reading ``mask`` on the host.

    Args:
        queries: Features ``(B, D)``, floating; L2-normalized here for the search.
        bank: Features ``(K, D)``; L2-normalized here.
        mask: Which rows of the bank are filled, ``(K,)`` bool.

    Returns:
        Unit rows of the bank, ``(B, D)``, in the dtype of the queries (float32 for 16-bit ones); the queries
        themselves if no row is filled.
    """
    rows = F.normalize(bank.to(queries.dtype), dim=1)
    similarity = F.normalize(queries, dim=1) @ rows.T  # (B, K)
    nearest = similarity.masked_fill(~mask, -torch.inf).argmax(1)
    return torch.where(mask.any(), rows[nearest], queries)


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the ``k`` largest values of each row, largest first, and their columns: `torch.topk`, faster on a CPU.

    A tournament: the ``k`` groups of columns with the largest maxima contain the ``k`` largest values, and these
    groups are found in the same way among the maxima, so each row needs a single vectorized pass.

    Args:
        values: ``(R, N)``.
        k: Number of values per row, 1 to N.

    Returns:
        Values ``(R, k)`` and column indices ``(R, k)``.
    """
    if values.device.type != "cpu" or values.shape[1] < GROUP * 2 * k:
        top = values.topk(k, dim=1)
        return top.values, top.indices
    rounds = [_tournament(rows, k, in_order=True) for rows in torch.split(values, ROWS)]
    return torch.cat([top for top, _ in rounds]), torch.cat([columns for _, columns in rounds])


def _tournament(values: Tensor, k: int, *, in_order: bool) -> tuple[Tensor, Tensor]:
    groups = values.shape[1] // GROUP
    if groups < 2 * k:
        top = values.topk(k, dim=1, sorted=in_order)
        return top.values, top.indices
    whole = groups * GROUP
    maxima = values[:, :whole].view(-1, GROUP, groups).amax(dim=1)  # columns g, g + groups, ... are a group
    _, winners = _tournament(maxima, k, in_order=False)
    columns = (winners.unsqueeze(1) + torch.arange(0, whole, groups).view(1, GROUP, 1)).flatten(1)
    rest = torch.arange(whole, values.shape[1]).expand(len(values), -1)
    columns = torch.cat([columns, rest], dim=1)
    top = values.gather(1, columns).topk(k, dim=1, sorted=in_order)
    return top.values, columns.gather(1, top.indices)


def knn_scores(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int | None = None,
) -> Tensor:
    """Compute each class's share of the weighted vote of the ``k`` nearest neighbors.

    The weight of a neighbor is exp(cosine / temperature), as in Wu et al. (https://arxiv.org/abs/1805.01978, sec. 3.4)
    and in DINO's ``eval_knn.py``.
    Differs from them: scores are divided by their sum, as in DINOv2, which preserves their order and cannot overflow
    at low temperatures.

    Args:
        queries: Features ``(Q, F)``, floating; L2-normalized here.
        bank: Features ``(N, F)``, floating; L2-normalized here.
        labels: Classes of the bank's rows ``(N,)``, integers in 0..num_classes - 1. Classes may be missing.
        num_classes: Number of classes C.
        k: Number of neighbors that vote, 1 to N.
        temperature: Divisor of the cosine similarities; unitless, > 0.
        chunk_size: Queries per chunk; None chooses it.

    Returns:
        Scores ``(Q, C)`` in float32; each row sums to 1; a class without neighbors has 0.

    Raises:
        ValueError: If shapes do not match, or an argument or a label is out of range.
    """
    check_at_least("num_classes", num_classes, 1)
    check_positive("temperature", temperature)
    check_class_labels("labels", labels, len(bank), num_classes)
    similarities, indices = nearest_neighbours(queries, bank, k, chunk_size=chunk_size)
    return vote(similarities, labels.long()[indices], num_classes=num_classes, temperature=temperature)


def vote(similarities: Tensor, labels: Tensor, *, num_classes: int, temperature: float) -> Tensor:
    """Compute each class's share of the weighted vote of given neighbors; see `knn_scores`.

    Args:
        similarities: Cosine similarities ``(Q, k)``.
        labels: Classes of the neighbors ``(Q, k)``, int64, in 0..num_classes - 1.
        num_classes: Number of classes C.
        temperature: Divisor of the similarities; unitless, > 0.

    Returns:
        Scores ``(Q, C)``; each row sums to 1.
    """
    return sum_votes(torch.softmax(similarities / temperature, dim=1), labels, num_classes)


def neighbour_vote(queries: Tensor, neighbours: Tensor, neighbour_labels: Tensor, *, temperature: float) -> Tensor:
    """Compute the vote of given neighbors with soft labels, for dense predictions such as segmentation.

    Source: Hummingbird (https://arxiv.org/abs/2306.01667, Eq. 2), cross-attention over the retrieved patches: weights
    are the softmax of cosine / temperature over the neighbors of a query.

    Args:
        queries: Features ``(Q, F)``, floating; L2-normalized here.
        neighbours: Features of the neighbors of each query, ``(Q, k, F)``; L2-normalized here.
        neighbour_labels: Their labels ``(Q, k, C)``, such as shares of the classes in a patch.
        temperature: Divisor of the cosine similarities; unitless, > 0; 0.02 in the paper.

    Returns:
        Weighted means of the labels, ``(Q, C)``.

    Raises:
        ValueError: If shapes do not match or the temperature is not positive.
    """
    check_positive("temperature", temperature)
    check_features("queries", queries)
    fits = neighbours.ndim == 3 and neighbours.shape[::2] == queries.shape
    got, hint = tuple(neighbours.shape), "Give k rows per query"
    require(fits, "neighbours", f"be ({len(queries)}, k, {queries.shape[1]})", got, hint)
    fits = neighbour_labels.ndim == 3 and neighbour_labels.shape[:2] == neighbours.shape[:2]
    got = tuple(neighbour_labels.shape)
    require(fits, "neighbour_labels", f"be {(*neighbours.shape[:2], 'C')}", got, "Give one row per neighbor")
    cosines = F.normalize(neighbours, dim=2) @ F.normalize(queries, dim=1).unsqueeze(2)  # (Q, k, 1)
    weights = torch.softmax(cosines / temperature, dim=1)
    votes: Tensor = (weights * neighbour_labels.to(weights.dtype)).sum(1)
    return votes


def sum_votes(weights: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Add the weights of the neighbors of each class.

    Args:
        weights: ``(Q, k)``.
        labels: Classes of the neighbors ``(Q, k)``, int64, in 0..num_classes - 1.
        num_classes: Number of classes C.

    Returns:
        Sums ``(Q, C)``.
    """
    return weights.new_zeros((len(weights), num_classes)).scatter_add_(1, labels, weights)


def largest_shares(shares: Tensor, number: int) -> Tensor:
    """Return the classes with the largest shares of a vote, largest first, of equal shares the smallest class.

    Args:
        shares: ``(Q, C)``.
        number: Number of classes K per query, 1 to C.

    Returns:
        Classes ``(Q, K)``, int64.
    """
    if number == 1:
        return shares.argmax(dim=1, keepdim=True)
    return shares.sort(dim=1, descending=True, stable=True).indices[:, :number]


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int | None = None,
) -> Tensor:
    """Predict the class with the largest share of the weighted vote of the ``k`` nearest neighbors.

    Args:
        queries: Features ``(Q, F)``, floating; L2-normalized here.
        bank: Features ``(N, F)``, floating; L2-normalized here.
        labels: Classes of the bank's rows ``(N,)``, integers in 0..num_classes - 1. Classes may be missing.
        num_classes: Number of classes C.
        k: Number of neighbors that vote, 1 to N.
        temperature: Divisor of the cosine similarities; unitless, > 0.
        chunk_size: Queries per chunk; None chooses it.

    Returns:
        Classes ``(Q,)``, int64; of equal shares the smallest class.

    Raises:
        ValueError: If shapes do not match, or an argument or a label is out of range.
    """
    scores = knn_scores(
        queries, bank, labels, num_classes=num_classes, k=k, temperature=temperature, chunk_size=chunk_size
    )
    return scores.argmax(dim=1)


def check_features(name: str, features: Tensor) -> None:
    """Check that features ``(N, F)`` are floating and 2-D."""
    ok = features.ndim == 2 and features.is_floating_point()
    hint = "Pass one row of features per image"
    require(ok, name, "be floating and 2-D", f"{tuple(features.shape)} {features.dtype}", hint)


def check_class_labels(name: str, labels: Tensor, rows: int, num_classes: int) -> None:
    """Check that labels ``(rows,)`` are class indices in 0..num_classes - 1."""
    ok = labels.shape == (rows,) and not (labels.is_floating_point() or labels.dtype == torch.bool)
    hint = "Pass one class index per row of features"
    require(ok, name, f"be integers of shape ({rows},)", f"{tuple(labels.shape)} {labels.dtype}", hint)
    if rows > 0:
        low, high = (int(bound) for bound in torch.aminmax(labels))
        fits = low >= 0 and high < num_classes
        require(fits, name, f"lie in 0..{num_classes - 1}", (low, high), "Increase `num_classes` or correct the labels")
