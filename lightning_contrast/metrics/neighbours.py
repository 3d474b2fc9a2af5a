"""Nearest neighbours by cosine similarity, and the weighted k-NN vote."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_positive, require

CHUNK_ELEMENTS = 1 << 25
"""Similarities held at a time where no chunk size is given: 128 MiB in float32. Smaller products are slower."""

GROUP = 4
"""Columns of a group of the tournament in `top_k`."""
ROWS = 64
"""Rows of a tournament: so few that its maxima stay in the processor's cache."""


def nearest_neighbours(
    queries: Tensor, bank: Tensor, k: int, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the ``k`` most similar rows of the bank for each query, most similar first.

    Args:
        queries: Features ``(Q, F)``, floating; L2-normalised here.
        bank: Features ``(N, F)``, floating; L2-normalised here.
        k: Neighbours of each query, 1 to N.
        chunk_size: Queries compared at a time, which bounds memory; None chooses it. The result does not depend on it.

    Returns:
        Cosine similarities ``(Q, k)`` in float32 and row numbers in the bank ``(Q, k)``. Which of several rows of
        equal similarity takes the last place is not specified.

    Raises:
        ValueError: If shapes do not fit or ``k`` is outside 1..N.
    """
    check_features("queries", queries)
    check_features("bank", bank)
    widths = (queries.shape[1], bank.shape[1])
    require(widths[0] == widths[1], "queries", "be as wide as `bank`", widths, "Take both from the same layer")
    check_at_least("k", k, 1)
    require(k <= len(bank), "k", f"be <= {len(bank)}, the number of rows in the bank", k, "Lower `k` or add rows")
    if chunk_size is not None:
        check_at_least("chunk_size", chunk_size, 1)
    return search(queries, F.normalize(bank.float(), dim=1), k, chunk_size=chunk_size)


def search(queries: Tensor, bank: Tensor, k: int, *, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return what `nearest_neighbours` does, for a bank that is normalised already, once for many calls.

    Args:
        queries: Features ``(Q, F)``, floating; L2-normalised here.
        bank: Features ``(N, F)``, float32, L2-normalised.
        k: Neighbours of each query, 1 to N.
        chunk_size: Queries compared at a time; None chooses it.
    """
    rows = max(1, CHUNK_ELEMENTS // len(bank)) if chunk_size is None else chunk_size
    similarities = bank.new_empty((len(queries), k))
    indices = torch.empty((len(queries), k), dtype=torch.int64, device=bank.device)
    buffer = bank.new_empty((min(rows, len(queries)), len(bank)))  # used again for each chunk
    for start in range(0, len(queries), rows):
        chunk = F.normalize(queries[start : start + rows].float(), dim=1)
        part = slice(start, start + len(chunk))
        similarities[part], indices[part] = top_k(torch.mm(chunk, bank.T, out=buffer[: len(chunk)]), k)
    return similarities, indices


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest values of each row, largest first, and their columns: `torch.topk`, faster on a CPU.

    A tournament: the ``k`` groups of columns with the largest maxima hold the ``k`` largest values, and the groups are
    found in the same way among the maxima. One vectorised pass over the row takes the place of copying it into a queue.

    Args:
        values: (R, N).
        k: 1 to N.

    Returns:
        Values (R, k) and column numbers (R, k).
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
    """Return each class's share of the weighted vote of the ``k`` nearest neighbours.

    A neighbour's weight is exp(cosine / temperature), the vote of Wu et al. (https://arxiv.org/abs/1805.01978, sec.
    3.4) and of DINO's ``eval_knn.py``. Differs from them: scores are divided by their sum, as in DINOv2, which leaves
    their order alone and cannot overflow at low temperatures.

    Args:
        queries: Features ``(Q, F)``, floating; L2-normalised here.
        bank: Features ``(N, F)``, floating; L2-normalised here.
        labels: Classes of the bank's rows ``(N,)``, integer, in 0..num_classes - 1. A class may be missing.
        num_classes: Number of classes C.
        k: Neighbours that vote, 1 to N.
        temperature: Divisor of the cosine similarities; unitless, > 0.
        chunk_size: Queries compared at a time; None chooses it.

    Returns:
        Scores ``(Q, C)`` in float32; each row sums to 1, a class without neighbour has 0.

    Raises:
        ValueError: If shapes do not fit, or an argument or a label is out of range.
    """
    check_at_least("num_classes", num_classes, 1)
    check_positive("temperature", temperature)
    check_class_labels("labels", labels, len(bank), num_classes)
    similarities, indices = nearest_neighbours(queries, bank, k, chunk_size=chunk_size)
    return vote(similarities, labels.long()[indices], num_classes=num_classes, temperature=temperature)


def vote(similarities: Tensor, labels: Tensor, *, num_classes: int, temperature: float) -> Tensor:
    """Return each class's share of the vote of neighbours that have been found; see `knn_scores`.

    Args:
        similarities: Cosine similarities ``(Q, k)``.
        labels: Classes of the neighbours ``(Q, k)``, int64, in 0..num_classes - 1.
        num_classes: Number of classes C.
        temperature: Divisor of the similarities; unitless, > 0.

    Returns:
        Scores ``(Q, C)``; each row sums to 1.
    """
    votes = torch.softmax(similarities / temperature, dim=1)
    return votes.new_zeros((len(votes), num_classes)).scatter_add_(1, labels, votes)


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
    """Return the class with the largest share of the vote, ``(Q,)``; of equal shares the smallest class.

    Arguments and errors are those of `knn_scores`.
    """
    scores = knn_scores(
        queries, bank, labels, num_classes=num_classes, k=k, temperature=temperature, chunk_size=chunk_size
    )
    return scores.argmax(dim=1)


def check_features(name: str, features: Tensor) -> None:
    """Check that features are floating and 2-D."""
    ok = features.ndim == 2 and features.is_floating_point()
    hint = "Give one row of features for each image"
    require(ok, name, "be floating and 2-D", f"{tuple(features.shape)} {features.dtype}", hint)


def check_class_labels(name: str, labels: Tensor, rows: int, num_classes: int) -> None:
    """Check that ``labels`` are ``rows`` class numbers in 0..num_classes - 1."""
    ok = labels.shape == (rows,) and not (labels.is_floating_point() or labels.dtype == torch.bool)
    hint = "Give one class number for each row of features"
    require(ok, name, f"be integers of shape ({rows},)", f"{tuple(labels.shape)} {labels.dtype}", hint)
    if rows > 0:
        low, high = (int(bound) for bound in torch.aminmax(labels))
        fits = low >= 0 and high < num_classes
        require(fits, name, f"lie in 0..{num_classes - 1}", (low, high), "Raise `num_classes` or mend the labels")
