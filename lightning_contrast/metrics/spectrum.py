"""How many dimensions features use: measures of the spectrum of a feature matrix."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.metrics.neighbours import check_features

RANKME_EPSILON = 1e-7
"""What RankMe adds to each share of the spectrum (https://arxiv.org/abs/2210.02885, Eq. 1)."""
FIT_RANGE = (5, 100)
"""The eigenvalues that the slope of alpha-ReQ is fitted to, counted from 1."""


def squared_singular_values(features: Tensor, *, center: bool = False) -> Tensor:
    """Return the squared singular values of a feature matrix, largest first.

    They are the eigenvalues of the smaller Gram matrix, formed and solved in float64. Divided by N they are those of
    the second-moment matrix of the features or, with ``center=True``, of their covariance.

    Args:
        features: ``(N, D)``, floating.
        center: Take the mean of each dimension away first.

    Returns:
        ``(min(N, D),)``, float64, >= 0, on the device of the features.

    Raises:
        ValueError: If the features are not floating and 2-D, or there are none.
    """
    check_features("features", features)
    require(features.numel() > 0, "features", "have rows", tuple(features.shape), "Give at least one row")
    x = features.detach().double()
    x = x - x.mean(dim=0) if center else x
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return _eigenvalues(gram)


def _eigenvalues(gram: Tensor) -> Tensor:
    """Return the eigenvalues of a positive semi-definite matrix, largest first, none below 0."""
    solved = torch.linalg.eigvalsh(gram.cpu())  # far faster there than on most accelerators, and the matrix is small
    largest_first: Tensor = solved.flip(0).clamp(min=0.0).to(gram.device)
    return largest_first


def entropy_rank(values: Tensor, epsilon: float = 0.0) -> Tensor:
    """Return ``exp(H(p))`` with ``p = values / sum(values) + epsilon``: how many values there are, in effect.

    Args:
        values: ``(K,)``, >= 0.
        epsilon: Added to each share, >= 0.

    Returns:
        A scalar; 1 where one value is all there is (0 where there is nothing at all and no epsilon), K where they are
        equal.
    """
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + epsilon
    present = values.sum() > 0
    rank: Tensor = torch.special.entr(shares).sum().exp() * present
    return rank


def rankme(features: Tensor) -> Tensor:
    """Return RankMe, the smooth rank of a feature matrix.

    Implements Eq. 1 of https://arxiv.org/abs/2210.02885: exp(H(p)) with p_k = s_k / sum(s) + 1e-7 over the singular
    values s of the features as they are, neither centred nor normalised. The paper takes 25,600 rows or more.

    Args:
        features: ``(N, D)``, floating.

    Returns:
        A float64 scalar, about 1 to min(N, D); 0 where all features are 0.

    Raises:
        ValueError: If the features are not floating and 2-D, or there are none.
    """
    return entropy_rank(squared_singular_values(features).sqrt(), RANKME_EPSILON)


def effective_rank(features: Tensor, *, center: bool = False) -> Tensor:
    """Return the effective rank of a feature matrix: exp(H(p)), p_k = s_k / sum(s) over its singular values s.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    Args:
        features: ``(N, D)``, floating.
        center: Take the mean of each dimension away first, which the source does not.

    Returns:
        A float64 scalar in 1..min(N, D); 0 where there is nothing but zeros.

    Raises:
        ValueError: If the features are not floating and 2-D, or there are none.
    """
    return entropy_rank(squared_singular_values(features, center=center).sqrt())


def participation_ratio(features: Tensor) -> Tensor:
    """Return ``sum(l)^2 / sum(l^2)`` over the eigenvalues ``l`` of the covariance of the features.

    It counts the large directions only, where the effective rank also counts the tail.

    Args:
        features: ``(N, D)``, floating.

    Returns:
        A float64 scalar in 1..min(N, D); 0 where the features do not vary.

    Raises:
        ValueError: If the features are not floating and 2-D, or there are none.
    """
    return _participation(squared_singular_values(features, center=True))


def _participation(eigenvalues: Tensor) -> Tensor:
    shares = eigenvalues / eigenvalues.sum().clamp(min=torch.finfo(eigenvalues.dtype).tiny)
    return torch.nan_to_num(1 / shares.square().sum(), posinf=0.0)


def alpha_req(features: Tensor, *, fit_range: tuple[int, int] = FIT_RANGE) -> Tensor:
    """Return alpha-ReQ, the exponent with which the eigenvalues of the covariance fall: ``l_k`` about ``k^-alpha``.

    Source: https://arxiv.org/abs/2202.05808. The slope is fitted to log-eigenvalues over log-rank by least squares
    with weights 1 / k. About 1 is good, far above 1 few directions carry everything, below 1 the spectrum is flat.

    Args:
        features: ``(N, D)``, floating.
        fit_range: First and last eigenvalue of the fit, counted from 1. Where there are fewer than the last (at most
            N - 1 and D, and no zeros), the fit ends there.

    Returns:
        A float64 scalar; NaN where fewer than two eigenvalues lie in the range.

    Raises:
        ValueError: If the features are not floating and 2-D, there are none, or the range is not one.
    """
    _check_fit_range(fit_range)
    eigenvalues = squared_singular_values(features, center=True)
    return power_law(eigenvalues, len(features), fit_range)


def power_law(eigenvalues: Tensor, rows: int, fit_range: tuple[int, int]) -> Tensor:
    """Return the exponent of the decay of eigenvalues; see `alpha_req`.

    Args:
        eigenvalues: ``(K,)``, largest first, float64.
        rows: Number of rows N that they come from: at most N - 1 are not 0.
        fit_range: First and last eigenvalue, counted from 1.
    """
    first, last = fit_range[0], min(fit_range[1], rows - 1, len(eigenvalues))
    used = eigenvalues[first - 1 : max(last, first - 1)]
    used = used[used > eigenvalues[0] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps]
    if len(used) < 2:
        return eigenvalues.new_tensor(math.nan)
    ranks = torch.arange(first, first + len(used), dtype=used.dtype, device=used.device)
    weights = 1 / ranks
    x, y = ranks.log(), used.log()
    x = x - (weights * x).sum() / weights.sum()
    return -(weights * x * y).sum() / (weights * x * x).sum()


def _check_fit_range(fit_range: tuple[int, int]) -> None:
    ok = len(fit_range) == 2 and 1 <= fit_range[0] < fit_range[1]
    require(ok, "fit_range", "be (first, last) with 1 <= first < last", fit_range, "Give for example (5, 100)")


class _Spectrum(Metric):
    """Sums from which the spectrum of all features follows, however they were cut into batches and ranks.

    Memory: (D + 1) D float64 numbers, whatever the number of rows.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    gram: Tensor
    total: Tensor
    rows: Tensor

    def __init__(self, num_features: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_features is not None:
            check_at_least("num_features", num_features, 1)
        width = num_features or 0
        self.num_features = num_features
        self.add_state("gram", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add features.

        Args:
            features: ``(B, D)``, floating.

        Raises:
            ValueError: If they are not floating and 2-D, or not as wide as those before.
        """
        check_features("features", features)
        x = features.detach().double()
        width = x.shape[1]
        if self.gram.numel() == 0:
            self.gram, self.total = x.new_zeros(width, width), x.new_zeros(width)
        hint = "Use one metric for each layer"
        require(width == len(self.total), "features", f"be {len(self.total)} wide", width, hint)
        self.gram += x.T @ x
        self.total += x.sum(dim=0)
        self.rows += len(x)

    def _squared_singular_values(self, *, center: bool) -> tuple[Tensor, int]:
        """Return the squared singular values, largest first, min(N, D) of them, and N."""
        rows = int(self.rows)
        if rows == 0:
            fail(type(self).__name__, "have features", 0, "Call `update` before `compute`")
        gram = self.gram - self.total.outer(self.total) / rows if center else self.gram
        return _eigenvalues(gram)[:rows], rows


class RankMe(_Spectrum):
    """RankMe of all features on all ranks, see `rankme`; its value differs from it by rounding only.

    Memory is bounded: (D + 1) D float64 numbers, whatever the number of rows.

    Args:
        num_features: D; None reads it from the first features. Give it where a rank may see none.
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = RankMe()
        >>> metric.update(torch.eye(6)[:4])
        >>> metric.update(torch.eye(6)[4:])
        >>> round(metric.compute().item(), 3)
        6.0
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return RankMe, a float64 scalar, about 1 to min(N, D).

        Raises:
            ValueError: If there are no features.
        """
        return entropy_rank(self._squared_singular_values(center=False)[0].sqrt(), RANKME_EPSILON)


class EffectiveRank(_Spectrum):
    """Effective rank of all features, see `effective_rank`. Memory and ranks: as for `RankMe`.

    Args:
        center: Take the mean of each dimension away first, which the source does not.
        num_features: D; None reads it from the first features. Give it where a rank may see none.
        kwargs: Of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, center: bool = False, num_features: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.center = center

    def compute(self) -> Tensor:
        """Return the effective rank, a float64 scalar in 1..min(N, D).

        Raises:
            ValueError: If there are no features.
        """
        return entropy_rank(self._squared_singular_values(center=self.center)[0].sqrt())


class AlphaReQ(_Spectrum):
    """Decay of the spectrum of all features, see `alpha_req`. Memory and ranks: as for `RankMe`.

    Args:
        fit_range: First and last eigenvalue of the fit, counted from 1.
        num_features: D; None reads it from the first features. Give it where a rank may see none.
        kwargs: Of `torchmetrics.Metric`.
    """

    def __init__(self, fit_range: tuple[int, int] = FIT_RANGE, num_features: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        _check_fit_range(fit_range)
        self.fit_range = fit_range

    def compute(self) -> Tensor:
        """Return alpha, a float64 scalar, NaN where fewer than two eigenvalues lie in the range.

        Raises:
            ValueError: If there are no features.
        """
        return power_law(*self._squared_singular_values(center=True), self.fit_range)
