"""Measures of the effective dimensionality of features, from the spectrum of the feature matrix."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.metrics.neighbours import check_features

RANKME_EPSILON = 1e-7
"""Epsilon of RankMe, added to each share of the spectrum (https://arxiv.org/abs/2210.02885, Eq. 1)."""
FIT_RANGE = (5, 100)
"""First and last eigenvalue of the fit of alpha-ReQ, counted from 1."""


def squared_singular_values(features: Tensor, *, center: bool = False) -> Tensor:
    """Compute the squared singular values of a feature matrix, largest first.

    They are the eigenvalues of the smaller Gram matrix, computed in float64. Divided by N they are the eigenvalues of
    the second-moment matrix of the features or, with ``center=True``, of their covariance.

    Args:
        features: Features ``(N, D)``, floating.
        center: Whether to subtract the mean of each dimension.

    Returns:
        ``(min(N, D),)``, float64, >= 0, on the device of the features.

    Raises:
        ValueError: If the features are not floating and 2-D, or there are none.
    """
    check_features("features", features)
    require(features.numel() > 0, "features", "have rows", tuple(features.shape), "Pass at least one row")
    x = features.detach().double()
    x = x - x.mean(dim=0) if center else x
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return _eigenvalues(gram)


def _eigenvalues(gram: Tensor) -> Tensor:
    """Compute the eigenvalues of a positive semi-definite matrix, largest first, clamped to >= 0."""
    solved = torch.linalg.eigvalsh(gram.cpu())  # faster on the CPU than on most accelerators for small matrices
    largest_first: Tensor = solved.flip(0).clamp(min=0.0).to(gram.device)
    return largest_first


def entropy_rank(values: Tensor, epsilon: float = 0.0) -> Tensor:
    """Compute the effective number of values, ``exp(H(p))`` with ``p = values / sum(values) + epsilon``.

    Args:
        values: ``(K,)``, >= 0.
        epsilon: Added to each share, >= 0.

    Returns:
        A scalar; 1 if a single value is not 0, K if all are equal, 0 if all are 0.
    """
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + epsilon
    present = values.sum() > 0
    rank: Tensor = torch.special.entr(shares).sum().exp() * present
    return rank


def rankme(features: Tensor) -> Tensor:
    """Compute RankMe, the smooth rank of a feature matrix.

    Implements Eq. 1 of https://arxiv.org/abs/2210.02885: exp(H(p)) with p_k = s_k / sum(s) + 1e-7 over the singular
    values s of the features, neither centered nor normalized. The paper uses at least 25,600 rows.

    Args:
        features: Features ``(N, D)``, floating.

    Returns:
        A float64 scalar, about 1 to min(N, D); 0 if all features are 0.

    Raises:
        ValueError: If the features are not floating and 2-D, or there are none.
    """
    return entropy_rank(squared_singular_values(features).sqrt(), RANKME_EPSILON)


def effective_rank(features: Tensor, *, center: bool = False) -> Tensor:
    """Compute the effective rank of a feature matrix: exp(H(p)), p_k = s_k / sum(s) over its singular values s.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    Args:
        features: Features ``(N, D)``, floating.
        center: Whether to subtract the mean of each dimension, which the source does not.

    Returns:
        A float64 scalar in 1..min(N, D); 0 if all features are 0.

    Raises:
        ValueError: If the features are not floating and 2-D, or there are none.
    """
    return entropy_rank(squared_singular_values(features, center=center).sqrt())


def participation_ratio(features: Tensor) -> Tensor:
    """Compute the participation ratio, ``sum(l)^2 / sum(l^2)`` over the eigenvalues ``l`` of the covariance.

    It is dominated by the largest eigenvalues, while the effective rank also counts the tail.

    Args:
        features: Features ``(N, D)``, floating.

    Returns:
        A float64 scalar in 1..min(N, D); 0 if the features are constant.

    Raises:
        ValueError: If the features are not floating and 2-D, or there are none.
    """
    return _participation(squared_singular_values(features, center=True))


def _participation(eigenvalues: Tensor) -> Tensor:
    shares = eigenvalues / eigenvalues.sum().clamp(min=torch.finfo(eigenvalues.dtype).tiny)
    return torch.nan_to_num(1 / shares.square().sum(), posinf=0.0)


def alpha_req(features: Tensor, *, fit_range: tuple[int, int] = FIT_RANGE) -> Tensor:
    """Compute alpha-ReQ, the exponent of the power law ``l_k ~ k^-alpha`` of the covariance's eigenvalues.

    Source: https://arxiv.org/abs/2202.05808. The slope of log-eigenvalues over log-rank is fitted by least squares
    with weights 1 / k. Values near 1 are good; far above 1 few directions dominate, below 1 the spectrum is flat.

    Args:
        features: Features ``(N, D)``, floating.
        fit_range: First and last eigenvalue of the fit, counted from 1. The fit ends earlier if there are fewer
            nonzero eigenvalues (at most N - 1 and D).

    Returns:
        A float64 scalar; NaN if fewer than two eigenvalues are in the range.

    Raises:
        ValueError: If the features are not floating and 2-D, there are none, or the range is invalid.
    """
    _check_fit_range(fit_range)
    eigenvalues = squared_singular_values(features, center=True)
    return power_law(eigenvalues, len(features), fit_range)


def power_law(eigenvalues: Tensor, rows: int, fit_range: tuple[int, int]) -> Tensor:
    """Fit the exponent of the power law of eigenvalues; see `alpha_req`.

    Args:
        eigenvalues: Eigenvalues ``(K,)``, largest first, float64.
        rows: Number of rows N of the features; at most N - 1 eigenvalues are not 0.
        fit_range: First and last eigenvalue, counted from 1.

    Returns:
        A float64 scalar; NaN if fewer than two eigenvalues are in the range.
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
    require(ok, "fit_range", "be (first, last) with 1 <= first < last", fit_range, "Pass for example (5, 100)")


class _Spectrum(Metric):
    """Second moments of all features, which determine their spectrum, over any split into batches and ranks.

    The state is (D + 1) D float64 numbers for any number of rows.
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
        """Update with features.

        Args:
            features: Features ``(B, D)``, floating.

        Raises:
            ValueError: If they are not floating and 2-D, or their width differs from that of earlier features.
        """
        check_features("features", features)
        x = features.detach().double()
        width = x.shape[1]
        if self.gram.numel() == 0:
            self.gram, self.total = x.new_zeros(width, width), x.new_zeros(width)
        hint = "Use one metric per layer"
        require(width == len(self.total), "features", f"be {len(self.total)} wide", width, hint)
        self.gram += x.T @ x
        self.total += x.sum(dim=0)
        self.rows += len(x)

    def _squared_singular_values(self, *, center: bool) -> tuple[Tensor, int]:
        """Return the squared singular values, largest first, ``(min(N, D),)``, and N."""
        rows = int(self.rows)
        if rows == 0:
            fail(type(self).__name__, "have features", 0, "Call `update` before `compute`")
        gram = self.gram - self.total.outer(self.total) / rows if center else self.gram
        return _eigenvalues(gram)[:rows], rows


class RankMe(_Spectrum):
    """RankMe of all features on all ranks; equal to `rankme` up to rounding.

    Memory is bounded: (D + 1) D float64 numbers for any number of rows.

    Args:
        num_features: D; None reads it from the first features. Required if a rank may receive no features.
        kwargs: Arguments of `torchmetrics.Metric`.

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
        """Compute RankMe, a float64 scalar, about 1 to min(N, D).

        Raises:
            ValueError: If there are no features.
        """
        return entropy_rank(self._squared_singular_values(center=False)[0].sqrt(), RANKME_EPSILON)


class EffectiveRank(_Spectrum):
    """Effective rank of all features on all ranks; see `effective_rank`. Memory is bounded as for `RankMe`.

    Args:
        center: Whether to subtract the mean of each dimension, which the source does not.
        num_features: D; None reads it from the first features. Required if a rank may receive no features.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, center: bool = False, num_features: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.center = center

    def compute(self) -> Tensor:
        """Compute the effective rank, a float64 scalar in 1..min(N, D).

        Raises:
            ValueError: If there are no features.
        """
        return entropy_rank(self._squared_singular_values(center=self.center)[0].sqrt())


class AlphaReQ(_Spectrum):
    """Power-law exponent of the spectrum of all features; see `alpha_req`. Memory is bounded as for `RankMe`.

    Args:
        fit_range: First and last eigenvalue of the fit, counted from 1.
        num_features: D; None reads it from the first features. Required if a rank may receive no features.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    def __init__(self, fit_range: tuple[int, int] = FIT_RANGE, num_features: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        _check_fit_range(fit_range)
        self.fit_range = fit_range

    def compute(self) -> Tensor:
        """Compute alpha, a float64 scalar; NaN if fewer than two eigenvalues are in the range.

        Raises:
            ValueError: If there are no features.
        """
        return power_law(*self._squared_singular_values(center=True), self.fit_range)
