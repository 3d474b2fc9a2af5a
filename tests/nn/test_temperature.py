"""Learned and scheduled temperatures: their values, bounds and gradients."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_contrast.nn import LearnedTemperature, ScheduledTemperature
from lightning_contrast.nn.temperature import check_temperature
from lightning_contrast.optim import build_optimizer, parameter_groups
from tests.tolerances import ROUNDED, bound, near


def test_a_learned_temperature_starts_where_it_is_told_and_has_a_gradient():
    temperature = LearnedTemperature(0.2).double()
    value = temperature()
    assert value.shape == (1,)
    assert value.item() == near(0.2, ROUNDED)
    (3 * value).sum().backward()
    assert temperature.log_temperature.grad.item() == near(3 * 0.2, ROUNDED)  # d exp(x) = exp(x) dx


@pytest.mark.parametrize(("start", "inwards", "limit"), [(5.0, 1.0, 0.5), (-9.0, -1.0, 0.01)])
def test_bounds_hold_and_let_go(start, inwards, limit):
    """A descent step moves against the gradient: the one that leads back passes, the other does not."""
    temperature = LearnedTemperature(0.1, minimum=0.01, maximum=0.5)
    temperature.log_temperature.data.fill_(start)
    assert temperature().item() == near(limit)
    (gradient,) = torch.autograd.grad(inwards * temperature(), temperature.log_temperature)
    assert gradient.item() == near(inwards * limit)
    (gradient,) = torch.autograd.grad(-inwards * temperature(), temperature.log_temperature)
    assert gradient.item() == 0


def test_training_reaches_the_best_temperature_from_behind_a_bound():
    temperature = LearnedTemperature(0.1, minimum=0.05, maximum=0.5)
    temperature.log_temperature.data.fill_(math.log(0.5) + 0.3)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        (temperature() - 0.2).square().backward()
        optimizer.step()
    assert temperature().item() == pytest.approx(0.2, abs=1e-3)


def test_a_learned_temperature_carries_no_weight_decay():
    decayed, others, own = parameter_groups(LearnedTemperature(), 0.1)
    assert not decayed["params"]
    assert not others["params"]
    assert len(own["params"]) == 1
    assert (own["weight_decay"], own["adapt"]) == (0, False)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_a_learned_temperature_has_a_rate_and_bounds_of_its_own(name):
    temperature = LearnedTemperature(0.1, minimum=0.08, maximum=0.12, lr=0.01)
    network = nn.ModuleDict({"weight": nn.Linear(3, 3), "temperature": temperature})
    optimizer = build_optimizer(name, parameter_groups(network, 0.1), lr=4.8)
    assert [group["lr"] for group in optimizer.param_groups] == [4.8, 4.8, 0.01]
    logarithm = temperature.log_temperature
    for direction, limit in ((-1.0, 0.12), (1.0, 0.08)):
        for step in range(60):
            logarithm.grad = torch.full((1,), direction)
            optimizer.step()
            assert 0.08 * (1 - bound(ROUNDED)) <= logarithm.exp().item() <= 0.12 * (1 + bound(ROUNDED))
            if step == 0 and name == "lars" and direction < 0:  # momentum SGD: no trust ratio, which would be 0.0023
                assert logarithm.item() == near(math.log(0.1) + 0.01, ROUNDED)
        assert temperature().item() == near(limit, ROUNDED)
    with pytest.raises(ValueError, match="`lr` must be > 0"):
        LearnedTemperature(lr=0.0)


def test_only_the_parameters_of_a_group_with_bounds_are_clamped():
    weight, scale = nn.Parameter(torch.full((2,), 5.0)), nn.Parameter(torch.full((1,), 5.0))
    optimizer = build_optimizer("sgd", [{"params": [weight]}, {"params": [scale], "bounds": (0.0, 1.0)}], lr=0.1)
    weight.grad, scale.grad = torch.zeros(2), torch.zeros(1)
    optimizer.step()
    assert weight.tolist() == [5.0, 5.0]
    assert scale.tolist() == [1.0]


def test_schedule_is_a_cosine_from_start_to_end():
    schedule = ScheduledTemperature(0.5, 0.1, steps=80)
    values = [schedule(step) for step in (0, 20, 40, 60, 80, 500)]
    quarter = 0.1 + 0.4 * (1 + math.cos(math.pi / 4)) / 2
    assert values == pytest.approx([0.5, quarter, 0.3, 0.6 - quarter, 0.1, 0.1])
    assert all(type(value) is float for value in values)


def test_whole_cycles_swing():
    schedule = ScheduledTemperature(1.0, 0.1, steps=100, cycles=2)
    assert [schedule(step) for step in (0, 25, 50, 75, 100)] == pytest.approx([1.0, 0.1, 1.0, 0.1, 1.0])


def test_schedule_over_the_run():
    schedule = ScheduledTemperature(0.5, 0.1)
    assert [schedule(step, 10) for step in (0, 5, 10)] == pytest.approx([0.5, 0.3, 0.1])
    assert ScheduledTemperature(0.5, 0.1, steps=5)(5, 10) == pytest.approx(0.1), "its own length wins"
    with pytest.raises(ValueError, match="`steps` must be given outside of a run"):
        schedule(3)


@pytest.mark.parametrize("temperature", [LearnedTemperature(0.2), ScheduledTemperature(0.5, 0.1)])
def test_copies(temperature):
    for other in (copy.deepcopy(temperature), pickle.loads(pickle.dumps(temperature))):
        assert repr(other) == repr(temperature)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LearnedTemperature(0.0), r"`init` must lie in \[0\.01, 1\.0\], got 0\.0"),
        (lambda: LearnedTemperature(2.0), r"`init` must lie in"),
        (lambda: LearnedTemperature(0.1, minimum=0.0), r"`minimum` must be > 0, got 0\.0"),
        (lambda: LearnedTemperature(0.1, minimum=0.5, maximum=0.2), r"`init` must lie in \[0\.5, 0\.2\]"),
        (lambda: ScheduledTemperature(0.0, 0.1), r"`start` must be > 0, got 0\.0"),
        (lambda: ScheduledTemperature(0.1, -1.0), r"`end` must be > 0, got -1\.0"),
        (lambda: ScheduledTemperature(0.1, 0.2, steps=0), r"`steps` must be >= 1, got 0"),
        (lambda: ScheduledTemperature(0.1, 0.2, cycles=0), r"`cycles` must be > 0, got 0"),
        (lambda: check_temperature(0), r"`temperature` must be > 0, got 0"),
        (lambda: check_temperature(float("nan")), r"`temperature` must be > 0, got nan"),
    ],
)
def test_bad_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("temperature", ["0.1", None, True, [0.1]])
def test_wrong_types(temperature):
    with pytest.raises(TypeError, match=r"`temperature` must be a number, a module or a function, got '"):
        check_temperature(temperature)
