"""RankMe, effective rank, participation ratio and alpha-ReQ against plain loops over numpy's singular values."""

import math

import numpy as np
import pytest
import torch

from lightning_contrast.metrics import (
    AlphaReQ,
    EffectiveRank,
    RankMe,
    alpha_req,
    effective_rank,
    participation_ratio,
    rankme,
)
from tests.launch import run_processes
from tests.tolerances import NETWORK, ROUNDED, decimals, near, near64


def features(count=40, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=g) @ torch.diag(torch.linspace(2, 0.1, width)) + 0.7


def singular_values(x, center=False):
    x = x.double().numpy()
    return np.linalg.svd(x - x.mean(axis=0) if center else x, compute_uv=False)


def rank_by_hand(values, epsilon=0.0):
    entropy = 0.0
    for value in values:
        p = value / sum(values) + epsilon
        entropy -= p * math.log(p) if p > 0 else 0.0
    return math.exp(entropy)


def slope_by_hand(eigenvalues, first, last):
    ranks = list(range(first, min(last, len(eigenvalues)) + 1))
    coefficients = np.polyfit(
        [math.log(k) for k in ranks],
        [math.log(eigenvalues[k - 1]) for k in ranks],
        1,
        w=[k**-0.5 for k in ranks],  # polyfit squares them
    )
    return -coefficients[0]


CASES = [(40, 12), (9, 12), (200, 30)]


@pytest.mark.parametrize(("count", "width"), CASES)
def test_functions_equal_plain_loops(count, width):
    x = features(count, width)
    centered = singular_values(x, center=True) ** 2
    assert rankme(x).item() == near(rank_by_hand(singular_values(x), 1e-7), ROUNDED)
    assert effective_rank(x).item() == near(rank_by_hand(singular_values(x)), ROUNDED)
    # float64 Gram matrices know a singular value that is 0 to 1e-8 of the largest
    assert effective_rank(x, center=True).item() == near(rank_by_hand(centered**0.5), NETWORK)
    assert participation_ratio(x).item() == near64(sum(centered) ** 2 / sum(centered**2))


def test_rankme_of_the_known_matrix():
    i, j = torch.arange(6, dtype=torch.float64).view(-1, 1), torch.arange(8, dtype=torch.float64)
    assert rankme(torch.sin(0.7 * i + 1.3 * j + 0.1 * i * j)).item() == pytest.approx(3.95267832, abs=decimals(8))


def test_alpha_req_finds_the_exponent_of_a_power_law():
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(300, 120, generator=g, dtype=torch.float64))[0]
    basis = torch.linalg.qr(basis - basis.mean(dim=0))[0]  # centered columns, so that the covariance is as given
    x = basis * torch.arange(1, 121, dtype=torch.float64).pow(-1.3 / 2)
    assert alpha_req(x).item() == near(1.3, ROUNDED, size=1)
    bent = x * torch.where(torch.arange(120) < 4, 30.0, 1.0)  # the first four eigenvalues are not looked at
    assert alpha_req(bent).item() == near(1.3, ROUNDED, size=1)
    assert abs(alpha_req(bent, fit_range=(1, 100)).item() - 1.3) > 0.5


def test_alpha_req_equals_a_weighted_fit():
    x = features(200, 30)
    eigenvalues = singular_values(x, center=True) ** 2
    assert alpha_req(x).item() == near64(slope_by_hand(eigenvalues, 5, 100))
    assert alpha_req(x, fit_range=(2, 9)).item() == near64(slope_by_hand(eigenvalues, 2, 9))
    assert alpha_req(x[:4]).isnan()  # three eigenvalues, none in the range


METRICS = [
    (lambda: RankMe(), rankme),
    (lambda: EffectiveRank(), effective_rank),
    (lambda: EffectiveRank(center=True), lambda x: effective_rank(x, center=True)),
    (lambda: AlphaReQ(fit_range=(1, 8)), lambda x: alpha_req(x, fit_range=(1, 8))),
]


@pytest.mark.parametrize(("make", "function"), METRICS)
def test_metrics_equal_the_functions_however_the_rows_are_cut(make, function):
    x = features(41)
    metric = make()
    for part in x.split(7):
        metric.update(part)
    assert metric.compute().item() == near(function(x).item(), ROUNDED)
    metric.reset()
    metric.update(x[:20, :9])  # another width after a reset
    assert metric.compute().item() == near(function(x[:20, :9]).item(), ROUNDED)


def test_memory_does_not_grow_with_the_rows():
    metric = RankMe()
    for _ in range(3):
        metric.update(features(500))
    assert sum(value.numel() for value in (metric.gram, metric.total, metric.rows)) == 12 * 12 + 12 + 1


@pytest.mark.dist
def test_two_ranks_measure_all_rows():
    x = features(41)

    def on_rank(rank):
        rows = slice(0, 13) if rank == 0 else slice(13, 41)
        values = []
        for make, _ in METRICS:
            metric = make()
            metric.update(x[rows])
            values.append(metric.compute().item())
        late = RankMe(num_features=12)
        if rank == 1:
            late.update(x)
        return [*values, late.compute().item()]

    expected = [*(function(x).item() for _, function in METRICS), rankme(x).item()]
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*before the ``update`` method.*")
        for values in run_processes(on_rank, 2):
            assert values == near(expected, ROUNDED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_float64_whatever_the_features_are(dtype):
    x = features().to(dtype)
    metric = RankMe()
    metric.update(x)
    assert metric.compute().item() == near(rank_by_hand(singular_values(x.double()), 1e-7), ROUNDED)


def test_features_without_spread_have_no_dimensions():
    assert rankme(torch.ones(20, 6)).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(20, 6)).item() == 0
    assert participation_ratio(torch.ones(20, 6)).item() == 0
    assert alpha_req(torch.ones(20, 6), fit_range=(1, 5)).isnan()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`features` must be floating and 2-D"):
        rankme(torch.ones(3, 2, 2))
    with pytest.raises(ValueError, match="`features` must have rows"):
        rankme(torch.ones(0, 2))
    with pytest.raises(ValueError, match="`fit_range` must be"):
        AlphaReQ(fit_range=(5, 5))
    with pytest.raises(ValueError, match="`num_features` must be >= 1"):
        RankMe(0)
    metric = RankMe()
    metric.update(torch.ones(3, 2))
    with pytest.raises(ValueError, match="`features` must be 2 wide, got 3"):
        metric.update(torch.ones(3, 3))
    with (
        pytest.raises(ValueError, match="`RankMe` must have features"),
        pytest.warns(UserWarning, match="before the ``update`` method"),
    ):
        RankMe().compute()
