"""DINO's centre, against the moving average in plain loops."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_contrast.nn import Center
from lightning_contrast.testing import HostSyncs
from tests.launch import run_processes
from tests.tolerances import FORMULA, bound, decimals, near


def oracle(steps, momentum):
    """Return the centre after optimizer steps, each a list of micro-batches of rows, in plain Python."""
    center = [0.0] * len(steps[0][0][0])
    for micro_batches in steps:
        rows = [row for micro_batch in micro_batches for row in micro_batch]
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        center = [momentum * c + (1 - momentum) * m for c, m in zip(center, mean, strict=True)]
    return torch.tensor(center)


def make_steps(seed=0):
    """Three optimizer steps of two unequal micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(size, 5, generator=generator) + 2 for size in (4, 2)] for _ in range(3)]


def test_it_is_the_average_of_the_means_of_all_micro_batches():
    center = Center(5, momentum=0.7)
    for micro_batches in make_steps():
        for logits in micro_batches:
            before = center.value
            assert torch.equal(center(logits), before)  # a forward pass only adds up
        center.commit()
    expected = oracle([[m.tolist() for m in step] for step in make_steps()], 0.7)
    torch.testing.assert_close(center.value, expected)
    assert center.value.dtype == torch.float32


def test_official_value_after_one_update():
    cases = json.loads((Path(__file__).parents[1] / "official_losses.json").read_text())
    case = next(case for case in cases if case["name"] == "dino")
    before, after = (torch.tensor(value).flatten() for value in (case["inputs"]["center"], case["center_after"]))
    center = Center(len(after))
    with torch.no_grad():
        center.bits.copy_(before.view(torch.int32))
    center(torch.tensor(case["inputs"]["teacher"]))
    center.commit()
    # both centers are published with six decimals
    torch.testing.assert_close(center.value, after, rtol=bound(FORMULA), atol=2 * decimals(6))


def test_patches_count_each():
    a, b = Center(3), Center(3)
    logits = torch.randn(2, 4, 3)
    a(logits)
    b(logits.flatten(0, 1))
    a.commit(), b.commit()
    assert torch.equal(a.value, b.value)


def test_commit_without_logits_and_discard_change_nothing():
    center = Center(2)
    center(torch.ones(3, 2))
    center.commit()
    before = center.value
    center.commit()
    center(torch.full((3, 2), torch.nan))
    center.discard()
    center.commit()
    assert torch.equal(center.value, before)
    center(torch.ones(1, 2))
    center.commit()
    torch.testing.assert_close(center.value, torch.full((2,), 0.19))  # and nothing of the NaN is left


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_mean_that_is_not_finite_leaves_the_centre(bad):
    center = Center(2)
    center(torch.ones(3, 2))
    center.commit()
    before = center.value
    center(torch.tensor([[1.0, bad], [1.0, 1.0]]))
    center.commit()
    assert torch.equal(center.value, before)


def test_half_precision_logits_are_added_in_float32():
    center = Center(1, momentum=0.0)
    logits = torch.full((4000, 1), 60000.0, dtype=torch.float16)  # whose sum float16 cannot hold
    center(logits)
    center.commit()
    assert center.value.item() == near(logits[0].item())


def test_casts_leave_it_float32_and_checkpoints_carry_it():
    center = Center(3)
    center(torch.tensor([[1 / 3, 1.0, 3.0]]))
    center.commit()
    before = center.value
    for cast in (center.half(), center.bfloat16(), center.double()):
        assert torch.equal(cast.value, before)
    assert cast.value.dtype == torch.float32
    again = Center(3)
    again.load_state_dict(center.state_dict())
    for other in (again, copy.deepcopy(center), pickle.loads(pickle.dumps(center))):
        assert torch.equal(other.value, before)
    assert list(center.state_dict()) == ["bits"]


class Operations(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host():
    center = Center(4)
    with HostSyncs() as syncs, Operations() as seen:
        center(torch.randn(3, 4))
        center(torch.randn(3, 4))
        center.commit()
        center.discard()
    copies = {"aten::lift_fresh"}  # what torch.tensor(number, device=...) would copy to the device
    assert seen.names
    assert not seen.names & copies
    assert syncs.places == []


@pytest.mark.dist
def test_ranks_with_unequal_batches_equal_one_process():
    steps = make_steps()

    def run(rank):
        center = Center(5, momentum=0.7)
        for micro_batches in steps:
            center(micro_batches[rank])  # 4 rows on one, 2 on the other
            center.commit()
        return center.value

    expected = oracle([[m.tolist() for m in step] for step in steps], 0.7)
    first, second = run_processes(run, 2)
    torch.testing.assert_close(first, expected)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Center(0), "`dim` must be >= 1, got 0"),
        (lambda: Center(3, momentum=1.1), r"`momentum` must lie in \[0, 1\], got 1.1"),
        (lambda: Center(3)(torch.ones(2, 4)), r"`logits` must have shape \(..., 3\), got \(2, 4\)"),
        (lambda: Center(3)(torch.ones(3)), r"`logits` must have shape \(..., 3\), got \(3,\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
