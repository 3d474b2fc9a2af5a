"""Linear CKA against plain loops over kernels."""

import numpy as np
import pytest
import torch

from lightning_contrast.metrics import CKA, cka
from tests.launch import run_processes
from tests.tolerances import decimals, near, near64


def pair(count=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=g) + 2
    return x, x[:, :4] @ torch.randn(4, 5, generator=g) + torch.randn(count, 5, generator=g) - 1


def hsic0(k, m):
    n = len(k)
    h = np.eye(n) - 1 / n
    return np.trace(k @ h @ m @ h) / (n - 1) ** 2


def hsic1(k, m):
    n = len(k)
    k, m = k * (1 - np.eye(n)), m * (1 - np.eye(n))
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))


def cka_by_hand(batches, hsic):
    """Take batches of (x, y) and divide the mean estimates."""
    kernels = [[z.double().numpy() @ z.double().numpy().T for z in batch] for batch in batches]
    both, first, second = (
        sum(hsic(pair[i], pair[j]) for pair in kernels) / len(kernels) for i, j in ((0, 1), (0, 0), (1, 1))
    )
    return both / (first * second) ** 0.5


def test_both_estimates_equal_kernels():
    x, y = pair()
    assert cka(x, y).item() == near64(cka_by_hand([(x, y)], hsic0))
    assert cka(x, y, unbiased=True).item() == near64(cka_by_hand([(x, y)], hsic1))


def test_known_values():
    i, j = torch.arange(6, dtype=torch.float64).view(-1, 1), torch.arange(8, dtype=torch.float64)
    x = torch.sin(0.7 * i + 1.3 * j + 0.1 * i * j)
    y = torch.sin(0.7 * i + 1.3 * j + 0.1 * i * j + 0.3 * (1 + 0.2 * i))
    assert cka(x, y).item() == pytest.approx(0.99545970, abs=decimals(8))
    assert cka(x, y, unbiased=True).item() == pytest.approx(0.99463273, abs=decimals(8))


def test_rotation_and_scale_change_nothing_and_independence_is_zero():
    x, _ = pair(400)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0]
    other = torch.randn(400, 12, generator=torch.Generator().manual_seed(4))
    for unbiased in (False, True):
        assert cka(x, 7 * x @ rotation - 3, unbiased=unbiased).item() == near(1, size=1)
    assert abs(cka(x, other, unbiased=True).item()) < 0.02 < cka(x, other).item()


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_metric_over_batches(unbiased):
    x, y = pair()
    batches = list(zip(x.split(10), y.split(10), strict=True))
    metric = CKA(unbiased)
    for batch in batches:
        metric.update(*batch)
    expected = cka_by_hand(batches, hsic1) if unbiased else cka_by_hand([(x, y)], hsic0)
    assert metric.compute().item() == near64(expected)


@pytest.mark.dist
@pytest.mark.parametrize("unbiased", [True, False])
def test_two_ranks(unbiased):
    x, y = pair()
    batches = list(zip(x.split(10), y.split(10), strict=True))

    def on_rank(rank):
        metric = CKA(unbiased)
        for batch in batches[:1] if rank == 0 else batches[1:]:
            metric.update(*batch)
        return metric.compute().item()

    expected = cka_by_hand(batches, hsic1) if unbiased else cka_by_hand([(x, y)], hsic0)
    assert run_processes(on_rank, 2) == [near64(expected)] * 2


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`x` must have as many rows as `y`"):
        cka(torch.ones(5, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="`x` must have at least 4 rows, got 3"):
        CKA().update(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(TypeError, match="`unbiased` must be True or False"):
        CKA("yes")
    metric = CKA(unbiased=False)
    metric.update(torch.rand(5, 2), torch.rand(5, 3))
    with pytest.raises(ValueError, match=r"`x and y` must be \(2, 3\) wide"):
        metric.update(torch.rand(5, 2), torch.rand(5, 4))
