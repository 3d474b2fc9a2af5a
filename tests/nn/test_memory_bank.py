"""NPID's memory bank, against the update in plain Python."""

import pytest
import torch

from lightning_contrast.nn import MemoryBank
from tests.tolerances import ROUNDED, f32


def test_the_start_is_that_of_the_reference():
    bank = MemoryBank(20_000, 128)
    bound = 1 / (128 / 3) ** 0.5
    assert bank.features.abs().max() <= bound
    assert bank.features.abs().max() == pytest.approx(bound, rel=1e-3)
    assert bank.features.mean().item() == pytest.approx(0, abs=1e-3)
    assert bank.features.square().sum(1).mean().item() == pytest.approx(1, abs=0.01)


def test_the_start_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = MemoryBank(5, 4).features
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(MemoryBank(5, 4).features, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(MemoryBank(5, 4, seed=1).features, first)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_rows_move_as_in_the_reference(momentum):
    bank = MemoryBank(6, 3, momentum)
    before, keys, indices = bank.features.clone().double(), torch.randn(3, 3), torch.tensor([4, 0, 2])
    bank.push(keys, indices)
    for i in range(6):
        expected = before[i]
        if i in indices:
            key = keys[indices.tolist().index(i)].double()
            moved = momentum * before[i] + (1 - momentum) * key
            expected = moved / moved.square().sum().sqrt()
        torch.testing.assert_close(bank.features[i].double(), expected, **f32(ROUNDED, size=0.1))


def test_the_last_of_equal_indices_counts():
    many, one = MemoryBank(4, 2), MemoryBank(4, 2)
    keys = torch.randn(4, 2)
    many.push(keys, torch.tensor([1, 3, 1, 3]))
    one.push(keys[2:], torch.tensor([1, 3]))
    assert torch.equal(many.features, one.features)


def test_rows_that_are_not_finite_change_nothing():
    bank = MemoryBank(3, 2)
    before = bank.features.clone()
    bank.push(torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]]), torch.tensor([0, 2]))
    assert torch.equal(bank.features, before)


def test_casts_leave_the_numbers_alone_and_state_restores_them():
    bank = MemoryBank(3, 2)
    bank.push(torch.randn(2, 2), torch.tensor([0, 1]))
    before = bank.features.clone()
    assert torch.equal(bank.half().bfloat16().features, before)
    other = MemoryBank(3, 2, seed=5)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.features, before)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: MemoryBank(0, 2), ValueError, "`num_samples` must be >= 1"),
        (lambda: MemoryBank(3, 2.5), TypeError, "`dim` must be a whole number"),
        (lambda: MemoryBank(3, 2, 1.5), ValueError, r"`momentum` must lie in \[0, 1\], got 1.5"),
        (lambda: MemoryBank(3, 2, seed=-1), ValueError, "`seed` must be >= 0"),
        (
            lambda: MemoryBank(3, 2).push(torch.ones(2, 2), torch.tensor([0, 3])),
            ValueError,
            r"`indices` must lie in \[0, 3\), got \(0, 3\). Set `num_samples`",
        ),
        (
            lambda: MemoryBank(3, 2).push(torch.ones(2, 2), torch.tensor([-1, 2])),
            ValueError,
            r"`indices` must lie in \[0, 3\), got \(-1, 2\)",
        ),
        (lambda: MemoryBank(3, 2).push(torch.ones(2, 3), torch.arange(2)), ValueError, r"`keys` must be \(B, 2\)"),
        (lambda: MemoryBank(3, 2).push(torch.ones(2, 2), torch.arange(3)), ValueError, r"`indices` must be \(2,\)"),
    ],
)
def test_bad_input_is_refused(act, error, words):
    with pytest.raises(error, match=words):
        act()
