"""Alignment and uniformity against plain loops."""

import math

import pytest
import torch

from lightning_contrast.metrics import Alignment, Uniformity
from tests.launch import run_processes
from tests.tolerances import decimals, near


def pairs(count=24, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(count, width, generator=g) + 0.5
    return a, a + 0.4 * torch.randn(count, width, generator=g)


def units(x):
    return [row / row.norm() for row in x.double()]


def alignment_by_hand(a, b, alpha=2.0):
    return sum(float((x - y).norm()) ** alpha for x, y in zip(units(a), units(b), strict=True)) / len(a)


def uniformity_by_hand(x, t=2.0):
    rows = units(x)
    potentials = [
        math.exp(-t * float((rows[i] - rows[j]).square().sum()))
        for i in range(len(rows))
        for j in range(len(rows))
        if i != j
    ]
    return math.log(sum(potentials) / len(potentials))


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
def test_alignment_equals_plain_loops(alpha):
    a, b = pairs()
    metric = Alignment(alpha)
    metric.update(a[:7], b[:7])
    metric.update(a[7:], b[7:])
    assert metric.compute().item() == near(alignment_by_hand(a, b, alpha))


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_equals_plain_loops(t, monkeypatch):
    monkeypatch.setattr("lightning_contrast.metrics.sphere.ROWS", 5)
    a, _ = pairs()
    metric = Uniformity(t)
    metric.update(a[:7])
    metric.update(a[7:])
    assert metric.compute().item() == near(uniformity_by_hand(a, t))


def test_known_values():
    i, j = torch.arange(6, dtype=torch.float64).view(-1, 1), torch.arange(8, dtype=torch.float64)
    x = torch.sin(0.7 * i + 1.3 * j + 0.1 * i * j)
    y = torch.sin(0.7 * i + 1.3 * j + 0.1 * i * j + 0.3 * (1 + 0.2 * i))
    align, values = Alignment(), []
    align.update(x, y)
    for view in (x, y):
        uniform = Uniformity()
        uniform.update(view)
        values.append(uniform.compute().item())
    assert align.compute().item() == pytest.approx(0.21476001, abs=decimals(8))
    assert sum(values) / 2 == near(-3.13034999, size=1)


def test_of_many_rows_a_bounded_sample_counts():
    g = torch.Generator().manual_seed(0)
    metric, state = Uniformity(max_samples=256), torch.get_rng_state()
    first = torch.randn(3000, 16, generator=g) + torch.eye(16)[0] * 9
    second = torch.randn(3000, 16, generator=g) - torch.eye(16)[0] * 9
    for part in torch.cat([first, second]).split(100):
        metric.update(part)
        assert sum(len(kept) for kept in metric.kept) < 2 * 256
    assert torch.equal(torch.get_rng_state(), state)
    share = (metric._lowest()[0][:, 0] > 0).float().mean().item()
    assert len(metric._lowest()[0]) == 256
    assert share == pytest.approx(0.5, abs=0.12)  # four deviations: old rows and new ones have the same chance
    expected = Uniformity(max_samples=6000)
    expected.update(torch.cat([first, second]))
    assert metric.compute().item() == pytest.approx(expected.compute().item(), abs=0.1)


@pytest.mark.dist
def test_two_ranks_count_all_pairs():
    a, b = pairs()

    def on_rank(rank):
        rows = slice(0, 9) if rank == 0 else slice(9, 24)
        align, uniform, sampled = Alignment(), Uniformity(), Uniformity(max_samples=6)
        align.update(a[rows], b[rows])
        uniform.update(a[rows])
        sampled.update(a[rows])
        return align.compute().item(), uniform.compute().item(), sampled.compute().item()

    first, second = run_processes(on_rank, 2)
    assert first == second
    assert first[:2] == near((alignment_by_hand(a, b), uniformity_by_hand(a)))


def test_equal_rows_are_at_the_upper_end():
    metric = Uniformity()
    metric.update(torch.ones(9, 4))
    assert metric.compute().item() == near(0, size=1)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`alpha` must be > 0"):
        Alignment(0)
    with pytest.raises(ValueError, match="`t` must be > 0"):
        Uniformity(0)
    with pytest.raises(ValueError, match="`max_samples` must be >= 2"):
        Uniformity(max_samples=1)
    with pytest.raises(ValueError, match="`view_a` and `view_b` must have the same 2-D shape"):
        Alignment().update(torch.ones(3, 2), torch.ones(4, 2))
    metric = Uniformity()
    metric.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="`Uniformity` must have at least 2 rows"):
        metric.compute()
