"""LARS against plain loops in float64, torch's SGD and timm's program."""

import copy

import pytest
import torch
from torch import nn

from lightning_contrast.optim import LARS, parameter_groups
from lightning_contrast.testing import count_host_syncs
from tests.tolerances import FORMULA, NETWORK, ROUNDED, decimals, f32, f64


def make_weights(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in ((4, 3), (5,), (2, 3, 3), (1,))]


def set_gradients(weights, step):
    generator = torch.Generator().manual_seed(100 + step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


def ratio_in_loops(weight, gradient, *, form, trust, decay, eps, clip, lr):
    w = sum(float(x) ** 2 for x in weight.flatten()) ** 0.5
    decayed = gradient + decay * weight
    shown = decayed if form == "A" else gradient
    g = sum(float(x) ** 2 for x in shown.flatten()) ** 0.5
    if w == 0 or g == 0:
        ratio = 1.0
    elif form == "A":
        ratio = trust * w / g
    else:
        ratio = trust * w / (g + decay * w + eps)
    return (min(ratio / lr, 1.0) if clip else ratio), decayed


@pytest.mark.parametrize(
    ("form", "clip", "lr_in_momentum"),
    [("A", False, False), ("A", False, True), ("B", False, False), ("B", True, False)],
)
def test_steps_equal_plain_loops_in_float64(form, clip, lr_in_momentum):
    weights = make_weights()
    expected = [w.detach().clone() for w in weights]
    velocity = [torch.zeros_like(w) for w in expected]
    options = {"trust": 0.02, "decay": 0.3, "eps": 1e-8}
    optimizer = LARS(
        weights, 0.5, 0.8, 0.3, trust_coefficient=0.02, trust_form=form, clip=clip, lr_in_momentum=lr_in_momentum
    )
    for step, lr in enumerate((0.5, 0.25, 0.01)):
        optimizer.param_groups[0]["lr"] = lr
        set_gradients(weights, step)
        for i, weight in enumerate(expected):
            ratio, update = ratio_in_loops(weight, weights[i].grad, form=form, clip=clip, lr=lr, **options)
            if lr_in_momentum:
                velocity[i] = 0.8 * velocity[i] + lr * ratio * update
                expected[i] = weight - velocity[i]
            else:
                velocity[i] = 0.8 * velocity[i] + ratio * update
                expected[i] = weight - lr * velocity[i]
        optimizer.step()
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), value, **f64(NETWORK))


@pytest.mark.parametrize(("form", "value"), [("A", 0.00447214), ("B", 0.00333333)])
def test_known_trust_ratio(form, value):
    start = torch.tensor([3.0, 4.0], dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    weight.grad = torch.tensor([0.8, -0.6], dtype=torch.float64)
    LARS([weight], lr=1.0, weight_decay=0.1, trust_form=form).step()
    ratio = (start - weight.detach()) / (weight.grad + 0.1 * start)
    torch.testing.assert_close(ratio, torch.full_like(ratio, value), rtol=0, atol=decimals(8))


@pytest.mark.parametrize("clip", [False, True])
def test_form_b_equals_timm(clip):
    from timm.optim.lars import Lars

    ours, theirs = make_weights(), make_weights()
    a = LARS(ours, 0.3, 0.9, 0.1, trust_form="B", clip=clip)
    b = Lars(theirs, lr=0.3, momentum=0.9, weight_decay=0.1, trust_clip=clip)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, **f64(NETWORK))


def test_excluded_group_is_plain_momentum_sgd_bit_for_bit():
    ours, theirs = make_weights(), make_weights()
    a = LARS([{"params": ours, "adapt": False}], 0.3, 0.9, weight_decay=0.1)
    b = torch.optim.SGD(theirs, lr=0.3, momentum=0.9)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_a_decay_that_an_excluded_group_names_itself_is_kept():
    ours, theirs = make_weights(), make_weights()
    a = LARS([{"params": ours, "adapt": False, "weight_decay": 0.1}], 0.3, 0.9)
    b = torch.optim.SGD(theirs, lr=0.3, momentum=0.9, weight_decay=0.1)
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    a.step()
    b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, **f64(FORMULA))


def test_gradients_are_not_written_and_missing_ones_leave_the_weight_alone():
    weights = make_weights()
    set_gradients(weights, 0)
    weights[1].grad = None
    gradients = [None if w.grad is None else w.grad.clone() for w in weights]
    untouched = weights[1].detach().clone()
    optimizer = LARS(weights, 0.3, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(weights[1], untouched)
    assert weights[1] not in optimizer.state
    assert all(w.grad is None if g is None else torch.equal(w.grad, g) for w, g in zip(weights, gradients, strict=True))


def test_zero_weight_and_zero_gradient_have_ratio_one():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    still = nn.Parameter(torch.ones(3, dtype=torch.float64))
    weight.grad, still.grad = torch.ones_like(weight), torch.zeros_like(still)
    LARS([weight, still], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, -0.5))
    torch.testing.assert_close(still.detach(), torch.ones_like(still))


@pytest.mark.parametrize("form", ["A", "B"])
def test_nothing_is_read_on_the_host(form):
    weights = make_weights()
    optimizer = LARS(weights, 0.3, weight_decay=0.1, trust_form=form, clip=form == "B")
    set_gradients(weights, 0)
    assert count_host_syncs(optimizer.step) == 0


def test_resume_equals_the_run_that_was_not_stopped():
    def run(weights, optimizer, steps):
        for step in steps:
            set_gradients(weights, step)
            optimizer.step()

    def build(weights):
        return LARS([{"params": weights[:2]}, {"params": weights[2:], "adapt": False}], 0.3, weight_decay=0.1)

    whole = make_weights()
    run(whole, build(whole), range(6))
    first = make_weights()
    optimizer = build(first)
    run(first, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    second = [nn.Parameter(w.detach().clone()) for w in first]
    resumed = build(second)
    resumed.load_state_dict(state)
    run(second, resumed, range(3, 6))
    assert all(torch.equal(x, y) for x, y in zip(whole, second, strict=True))


def test_state_loads_with_weights_only(tmp_path):
    weights = make_weights()
    optimizer = LARS(weights, 0.3)
    set_gradients(weights, 0)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(loaded["state"][0]["momentum_buffer"], optimizer.state[weights[0]]["momentum_buffer"])


def test_bfloat16_weights_take_float32_norms():
    weights = [nn.Parameter(w.detach().bfloat16()) for w in make_weights()]
    set_gradients(weights, 0)
    weight, gradient = weights[0].detach().clone(), weights[0].grad.float()
    LARS(weights, 1.0, trust_coefficient=1.0).step()
    expected = weight.float() - weight.float().norm() / gradient.norm() * gradient
    torch.testing.assert_close(weights[0].detach().float(), expected, rtol=2e-2, atol=2e-2)


def test_closure_and_scheduler():
    weight = nn.Parameter(torch.ones(3))
    optimizer = LARS([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 1))

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert torch.equal(weight, torch.ones(3))  # a rate of 0 moves nothing
    scheduler.step()
    optimizer.step(closure)
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9981), **f32(ROUNDED))  # 1 - (0.0009 + 0.001)


def test_groups_of_a_network_step_together():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = LARS(parameter_groups(network, 1e-4), lr=0.1)
    before = [p.detach().clone() for p in network.parameters()]
    network(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True) if p.grad.any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"`lr` must be >= 0, got -0\.1"),
        ({"momentum": 1.0}, r"`momentum` must lie in \[0, 1\), got 1\.0"),
        ({"weight_decay": -1}, r"`weight_decay` must be >= 0, got -1"),
        ({"eps": -1e-8}, r"`eps` must be >= 0"),
        ({"trust_coefficient": 0.0}, r"`trust_coefficient` must be > 0, got 0\.0"),
        ({"trust_form": "C"}, r"`trust_form` must be one of 'A', 'B', got 'C'"),
        ({"clip": True}, r"`clip` must be False with `trust_form=\"A\"`, got True"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LARS(make_weights(), **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=message):
        LARS([{"params": make_weights(), **options}], lr=0.1)


def test_tensor_rate_and_sparse_gradient_are_refused():
    with pytest.raises(TypeError, match="`lr` must be a number"):
        LARS(make_weights(), lr=torch.tensor(0.1))
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, 0, 0]).to_sparse()
    with pytest.raises(ValueError, match="must be dense"):
        LARS([weight], lr=0.1).step()
