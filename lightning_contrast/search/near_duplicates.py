"""Near duplicates among the vectors of images: groups of images that are linked by a high cosine."""

from typing import NamedTuple

from torch import Tensor

from lightning_contrast._checks import check_interval, fail

_BLOCK = 2048


class Duplicates(NamedTuple):
    """A group of images of which each is a near duplicate of another one in the group.

    Attributes:
        rows: Positions of the images, ascending.
        lowest: Lowest cosine of two images of the group; links can chain, so it may be below the threshold.
    """

    rows: list[int]
    lowest: float


def group_duplicates(vectors: Tensor, threshold: float) -> list[Duplicates]:
    """Return groups of near duplicates: the connected parts of the graph of pairs with a cosine above a threshold.

    All pairs are compared, N² / 2 products of D numbers, in blocks.

    Args:
        vectors: Unit rows (N, D), float32.
        threshold: Lowest cosine of a linked pair, in (-1, 1].

    Returns:
        The groups with two images or more, largest first.

    Raises:
        ValueError: If the threshold is out of its range or the vectors are not two-dimensional.

    Example:
        >>> group_duplicates(torch.tensor([[1.0, 0], [0, 1], [1, 0]]), 0.9)
        [Duplicates(rows=[0, 2], lowest=1.0)]
    """
    check_cosine("threshold", threshold)
    if vectors.ndim != 2:
        fail("vectors", "have the shape (N, D)", tuple(vectors.shape), "Give one row per image")
    parent = list(range(len(vectors)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    linked = min(threshold, 1 - 1e-6)  # float32 gives equal vectors a cosine just below 1
    for top in range(0, len(vectors), _BLOCK):
        for left in range(top, len(vectors), _BLOCK):
            cosines = vectors[top : top + _BLOCK] @ vectors[left : left + _BLOCK].T
            for first, second in (cosines >= linked).nonzero().tolist():
                a, b = root(first + top), root(second + left)
                if a != b:
                    parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for row in range(len(parent)):
        groups.setdefault(root(row), []).append(row)
    found = [rows for rows in groups.values() if len(rows) > 1]
    found.sort(key=lambda rows: (-len(rows), rows))
    return [Duplicates(rows, _lowest(vectors[rows])) for rows in found]


def check_cosine(name: str, threshold: float) -> None:
    """Check that the lowest cosine of near duplicates lies in (-1, 1]."""
    check_interval(name, threshold, "(-1, 1]", "Give a cosine such as 0.95")


def _lowest(rows: Tensor) -> float:
    """Return the lowest cosine of two unit rows of (n, D)."""
    lowest = min(float((rows[start : start + _BLOCK] @ rows.T).min()) for start in range(0, len(rows), _BLOCK))
    return max(-1.0, min(1.0, lowest))
