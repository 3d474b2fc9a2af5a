"""Schedules against their closed forms and torch's own."""

import math

import pytest
import torch

from lightning_contrast.optim import (
    constant,
    momentum_schedule,
    scaled_lr,
    step_decay,
    warmup_cosine,
    weight_decay_cosine,
)
from tests.tolerances import NETWORK, ROUNDED, near64


@pytest.mark.parametrize("end", [0.0, 0.001])
def test_warmup_cosine_closed_form(end):
    values = [warmup_cosine(k, 10, 110, end=end) for k in range(111)]
    assert values[:11] == pytest.approx([k / 10 for k in range(11)])
    quarter = 0.5 * (1 + math.cos(math.pi / 4))
    assert values[35] == pytest.approx(quarter + end * (1 - quarter))
    assert values[60] == pytest.approx((1 + end) / 2)
    assert values[110] == pytest.approx(end)
    assert warmup_cosine(500, 10, 110, end=end) == end


def test_warmup_start_and_edges():
    assert warmup_cosine(0, 10, 100, start=0.1) == pytest.approx(0.1)
    assert warmup_cosine(5, 10, 100, start=0.1) == pytest.approx(0.55)
    assert warmup_cosine(0, 0, 100) == 1.0
    assert warmup_cosine(9, 10, 10) == pytest.approx(0.9)  # a run that is all warm-up
    assert warmup_cosine(10, 10, 10) == 0.0


def test_cosine_equals_torch():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=17)
    for step in range(17):
        assert warmup_cosine(step, 0, 17) == near64(reference.get_last_lr()[0], NETWORK, size=1)
        optimizer.step()
        reference.step()


def test_longer_warmup_than_run_names_both():
    with pytest.raises(ValueError, match=r"`warmup_steps` must be at most the 50 steps of the run, got 60\."):
        warmup_cosine(0, 60, 50)


def test_constant_and_step_schedules():
    assert [constant(k) for k in (0, 7)] == [1.0, 1.0]
    factors = [step_decay(e, (120, 160)) for e in (0, 119, 120, 159, 160, 199)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_weight_decay_cosine():
    values = [weight_decay_cosine(k, 100, 0.04, 0.4) for k in (0, 25, 50, 100, 120)]
    quarter = 0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi / 4))
    assert values == pytest.approx([0.04, quarter, 0.22, 0.4, 0.4])


def test_momentum_schedule():
    total = 200
    for k in (0, 1, 77, 200):
        byol = 1 - (1 - 0.996) * (math.cos(math.pi * k / total) + 1) / 2
        assert momentum_schedule(k, total, 0.996) == near64(byol, ROUNDED, size=1)
    assert momentum_schedule(50, 200, 0.99, 0.999, "linear") == pytest.approx(0.99225)
    assert momentum_schedule(500, 200, 0.99, 0.999, "linear") == pytest.approx(0.999)
    assert momentum_schedule(150, 200, 0.999, kind="constant") == 0.999
    assert momentum_schedule(0, 10, 0.9) == pytest.approx(0.9)
    assert momentum_schedule(10, 10, 0.9) == 1.0


def test_scaled_lr():
    assert scaled_lr(0.3, 4096) == pytest.approx(4.8)
    assert scaled_lr(0.075, 4096, "sqrt") == pytest.approx(4.8)
    assert scaled_lr(0.075, 256, "sqrt") == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warmup_cosine(0, 0, 0), "`total_steps` must be > 0, got 0"),
        (lambda: warmup_cosine(-1, 0, 5), "`step` must be >= 0, got -1"),
        (lambda: warmup_cosine(0, -1, 5), "`warmup_steps` must be >= 0, got -1"),
        (lambda: step_decay(0, (3,), factor=0), "`factor` must be > 0, got 0"),
        (lambda: weight_decay_cosine(0, 5, -0.1, 0.4), "`start` must be >= 0, got -0.1"),
        (lambda: momentum_schedule(0, 5, 1.2), r"`start` must lie in \[0, 1\], got 1.2"),
        (lambda: momentum_schedule(0, 5, 0.9, kind="cos"), "`kind` must be one of .* Did you mean 'cosine'"),
        (lambda: momentum_schedule(0, 0, 0.9), "`total_steps` must be > 0, got 0"),
        (lambda: scaled_lr(0.3, 0), "`batch_size` must be > 0, got 0"),
        (lambda: scaled_lr(0.3, 256, "root"), "`rule` must be one of 'linear', 'sqrt', got 'root'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
