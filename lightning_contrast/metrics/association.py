"""Association tests of embeddings: are concepts closer to one attribute than to another."""

from itertools import combinations
from math import comb
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast._checks import check_at_least, require
from lightning_contrast.metrics.neighbours import check_features


class AssociationTest(NamedTuple):
    """Result of `association_test`.

    Args:
        effect: Effect size d, a float64 scalar in about -2 .. 2; > 0: x is closer to a, and y to b.
        p_value: Share of the equal partitions of x and y that are at least as extreme, in (0, 1].
    """

    effect: Tensor
    p_value: float


def association(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute the effect size of the association of a concept with two attributes (SC-WEAT).

    ``(mean cos(w, a) - mean cos(w, b)) / std cos(w, a and b)`` with the sample standard deviation, of Caliskan et al.
    2017 (https://arxiv.org/abs/1608.07187). Computed in float64. Cosines that are all near 1 make it no smaller.

    Args:
        w: Features of one image, ``(D,)``, or of N images, ``(N, D)``.
        a: Features that stand for the first attribute, ``(A, D)``.
        b: Features that stand for the second, ``(B, D)``.

    Returns:
        Float64, a scalar or ``(N,)``; > 0: closer to ``a``.

    Raises:
        ValueError: If the widths differ or there are no rows.
        TypeError: If features are not floating point.
    """
    rows = w[None] if w.ndim == 1 else w
    _check_widths(w=rows, a=a, b=b)
    to_a, to_b = _cosines(rows, a), _cosines(rows, b)
    effect = (to_a.mean(1) - to_b.mean(1)) / torch.cat([to_a, to_b], dim=1).std(1)
    return effect[0] if w.ndim == 1 else effect


def association_test(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, permutations: int = 10_000, seed: int = 0
) -> AssociationTest:
    """Test whether two concepts are associated with two attributes in different ways (iEAT, WEAT).

    Implements iEAT (https://arxiv.org/abs/2010.15052) as its reference implementation: ``s(w) = mean cos(w, a) - mean
    cos(w, b)``, and the effect is the difference of the means of s over x and over y, divided by the sample standard
    deviation of s over both. The p-value is the share of partitions of x and y into equal halves whose sum of s over
    the first is not below that of x; it is exact if there are at most ``permutations`` partitions, which is up to 7
    images each by default, else over random ones and the given one. Computed in float64, the partitions on the
    CPU.

    Args:
        x: Features of the first concept, ``(N, D)``.
        y: Features of the second, ``(N, D)``.
        a: Features of the first attribute, ``(A, D)``.
        b: Features of the second, ``(B, D)``.
        permutations: Largest number of partitions, >= 1.
        seed: Seed of the random partitions, >= 0.

    Returns:
        The effect size and the one-sided p-value.

    Raises:
        ValueError: If widths differ, x and y have not equally many rows, there are none, or a number is out of range.
        TypeError: If features are not floating point.

    Example:
        >>> x, y = torch.tensor([[1.0, 0.1], [1.0, 0.2]]), torch.tensor([[0.1, 1.0], [0.2, 1.0]])
        >>> found = association_test(x, y, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        >>> round(found.effect.item(), 2), round(found.p_value, 4)  # one of the six partitions
        (1.73, 0.1667)
    """
    check_at_least("permutations", permutations, 1)
    check_at_least("seed", seed, 0)
    _check_widths(x=x, y=y, a=a, b=b)
    sizes = len(x), len(y)
    require(len(x) == len(y), "x", "have as many rows as `y`", sizes, "Leave images out of the larger set")
    both = torch.cat([x, y])
    s = _cosines(both, a).mean(1) - _cosines(both, b).mean(1)  # (2 N,)
    effect = (s[: len(x)].mean() - s[len(x) :].mean()) / s.std()
    s = s.cpu()
    if comb(len(s), len(x)) <= permutations:
        halves = torch.tensor(list(combinations(range(len(s)), len(x))))
    else:
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randperm(len(s), generator=generator)[: len(x)] for _ in range(permutations - 1)]
        halves = torch.stack([torch.arange(len(x)), *draws])
    sums = s[halves].sum(1)  # the given partition is the first
    rounding = 1e-12 * s.abs().sum()  # equal sums count, in whatever order they were added
    return AssociationTest(effect, float((sums >= sums[0] - rounding).double().mean()))


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosines of rows (N, D) and (M, D), (N, M) float64, without gradient."""
    rows, columns = (F.normalize(z.detach().double(), dim=1) for z in (x, y))
    return rows @ columns.T


def _check_widths(**features: Tensor) -> None:
    """Check features (N, D) of one width with at least one row."""
    width = next(iter(features.values())).shape[-1]
    for name, values in features.items():
        check_features(name, values)
        shape = tuple(values.shape)
        require(shape[0] > 0, name, "have at least one row", shape, "Give the features of some images")
        require(shape[1] == width, name, f"have shape (rows, {width})", shape, "Encode all with one network")
