"""Accuracy per group and Wilson intervals, against the formula and known values."""

import math
from statistics import NormalDist

import pytest
import torch

from lightning_contrast.metrics import GroupAccuracy, wilson_interval
from tests.launch import run_processes
from tests.tolerances import near64


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (28, 56, 0.3733, 0.6267)],
)
def test_known_intervals(correct, total, low, high):
    found = wilson_interval(torch.tensor(correct), torch.tensor(total))
    assert [round(float(value), 4) for value in found] == [low, high]


def test_the_interval_solves_its_equation():
    """The ends are the shares p from which the observed one is 1.645 standard errors of p away."""
    low, high = wilson_interval(torch.tensor([7]), torch.tensor([23]), confidence=0.9)
    for p in (float(low), float(high)):
        assert abs(7 / 23 - p) / math.sqrt(p * (1 - p) / 23) == near64(NormalDist().inv_cdf(0.95))
    nothing = wilson_interval(torch.tensor([0]), torch.tensor([0]))
    assert [float(value) for value in nothing] == [0, 1]


PREDICTED = torch.tensor([0, 1, 1, 2, 2, 0, 1])
LABELS = torch.tensor([0, 1, 2, 2, 0, 0, 1])
GROUPS = torch.tensor([0, 0, 0, 3, 3, -1, 3])


def test_counts_by_hand_over_batches():
    metric = GroupAccuracy(4)
    for rows in (slice(0, 3), slice(3, 3), slice(3, 7)):
        metric.update(PREDICTED[rows], LABELS[rows], GROUPS[rows])
    found = metric.compute()
    assert found["images"].tolist() == [3, 0, 0, 3]
    assert found["groups"].nan_to_num(-1).tolist() == near64([2 / 3, -1, -1, 2 / 3])
    assert float(found["accuracy"]) == near64(4 / 6)
    assert float(found["worst"]) == near64(2 / 3)
    assert float(found["gap"]) == 0
    low, high = wilson_interval(torch.tensor([2]), torch.tensor([3]))
    assert [float(found[key][3]) for key in ("low", "high")] == near64([float(low), float(high)])
    assert [float(found[key][1]) for key in ("low", "high")] == [0, 1]


def test_worst_and_gap():
    metric = GroupAccuracy(3)
    metric.update(torch.tensor([1, 1, 1, 1]), torch.tensor([1, 1, 0, 1]), torch.tensor([0, 1, 1, 2]))
    found = metric.compute()
    assert (float(found["worst"]), float(found["gap"])) == (0.5, 0.5)
    metric.reset()
    metric.update(PREDICTED[:0], LABELS[:0], GROUPS[:0])
    assert all(math.isnan(float(metric.compute()[key])) for key in ("accuracy", "worst", "gap"))


@pytest.mark.dist
def test_ranks_equal_one_process():
    def work(rank):
        metric = GroupAccuracy(4)
        rows = slice(0, 2) if rank == 0 else slice(2, 7)
        metric.update(PREDICTED[rows], LABELS[rows], GROUPS[rows])
        return {key: value.nan_to_num(-1).tolist() for key, value in metric.compute().items()}

    whole = GroupAccuracy(4)
    whole.update(PREDICTED, LABELS, GROUPS)
    expected = {key: value.nan_to_num(-1).tolist() for key, value in whole.compute().items()}
    assert run_processes(work, 2) == [expected, expected]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: GroupAccuracy(0), ValueError, "`num_groups`"),
        (lambda: GroupAccuracy(2.0), TypeError, "`num_groups`"),
        (lambda: GroupAccuracy(2, confidence=1.0), ValueError, "`confidence`"),
        (lambda: GroupAccuracy(2).update(PREDICTED, LABELS, GROUPS), ValueError, "`groups` must be below 2, got 3"),
        (lambda: GroupAccuracy(4).update(PREDICTED[:2], LABELS, GROUPS), ValueError, "`predictions`"),
        (lambda: GroupAccuracy(4).update(PREDICTED.float(), LABELS, GROUPS), TypeError, "`predictions`"),
        (lambda: wilson_interval(torch.ones(2), torch.ones(3)), ValueError, "`correct`"),
        (lambda: wilson_interval(torch.ones(2), torch.ones(2), confidence=0), ValueError, "`confidence`"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
