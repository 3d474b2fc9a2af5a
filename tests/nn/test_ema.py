"""The moving average of weights, against the formula in plain loops and float64."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_contrast.nn import ema_update
from tests.tolerances import FORMULA, ROUNDED, f32


def networks():
    torch.manual_seed(0)
    online = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    target = copy.deepcopy(online).requires_grad_(False)
    with torch.no_grad():
        for tensor in online.state_dict().values():
            tensor += torch.ones_like(tensor) if not tensor.is_floating_point() else torch.randn_like(tensor)
    return online, target


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.996, 1.0])
def test_it_is_the_formula(momentum):
    online, target = networks()
    before = copy.deepcopy(target)
    ema_update(online, target, momentum)
    for moved, old, new in zip(target.parameters(), before.parameters(), online.parameters(), strict=True):
        expected = momentum * old.double() + (1 - momentum) * new.double()
        torch.testing.assert_close(moved.double(), expected, **f32(ROUNDED, size=0.1))


def test_the_ends_are_exact():
    online, target = networks()
    before = copy.deepcopy(target)
    ema_update(online, target, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), before.parameters(), strict=True))
    ema_update(online, target, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), online.parameters(), strict=True))


@pytest.mark.parametrize("rule", ["none", "copy", "ema"])
def test_buffers_follow_their_rule_and_counters_are_copied(rule):
    online, target = networks()
    old = target[1].running_mean.clone()
    ema_update(online, target, 0.9, buffers=rule)
    new = online[1].running_mean
    expected = {"none": old, "copy": new, "ema": 0.9 * old + 0.1 * new}[rule]
    torch.testing.assert_close(target[1].running_mean, expected)
    assert target[1].num_batches_tracked == online[1].num_batches_tracked == 1


def test_a_float32_target_follows_half_precision_weights():
    online, target = networks()
    online.to(torch.bfloat16)
    before = target[3].weight.clone()
    for _ in range(100):
        ema_update(online, target, 0.999)
    expected = online[3].weight.double() + (before.double() - online[3].weight.double()) * 0.999**100
    torch.testing.assert_close(target[3].weight.double(), expected, **f32(FORMULA, size=0.1))


def test_the_online_network_and_the_graph_are_left_alone():
    online, target = networks()
    before = copy.deepcopy(online.state_dict())
    ema_update(online, target, 0.9, buffers="ema")
    assert all(torch.equal(value, before[name]) for name, value in online.state_dict().items())
    assert all(p.grad_fn is None and not p.requires_grad for p in target.parameters())


def test_tied_weights_move_once():
    online = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    online[1].weight = online[0].weight
    target = copy.deepcopy(online).requires_grad_(False)
    nn.init.zeros_(target[0].weight)
    ema_update(online, target, 0.5)
    torch.testing.assert_close(target[1].weight, online[0].weight / 2)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_outside_its_range_is_refused(momentum):
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\]"):
        ema_update(*networks(), momentum)


def test_an_unknown_buffer_rule_names_the_near_one():
    with pytest.raises(ValueError, match=r"`buffers` must be one of.*Did you mean 'copy'"):
        ema_update(*networks(), 0.9, buffers="copyy")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (nn.Linear(3, 3), r"'weight' of shape \(2, 3\) in the online and \(3, 3\)"),
        (nn.Linear(3, 2, bias=False), "'bias' in the online module and not in the momentum module"),
    ],
)
def test_unequal_structures_are_refused_and_nothing_moves(target, words):
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=words):
        ema_update(nn.Linear(3, 2), target, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


class Launches(TorchDispatchMode):
    """Count the operators that launch a kernel: all but views and reads of metadata."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and func not in (torch.ops.aten.detach.default, torch.ops.aten.is_same_size.default):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def one_by_one(online, target, momentum, rule):
    """The update with one copy per buffer."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1.0 - momentum)
        for source, buffer in zip(online.buffers(), target.buffers(), strict=True):
            if rule == "ema" and buffer.is_floating_point():
                buffer.lerp_(source, 1.0 - momentum)
            elif rule == "copy" or not buffer.is_floating_point():
                buffer.copy_(source)


@pytest.mark.parametrize("rule", ["none", "copy", "ema"])
@pytest.mark.slow
def test_an_update_launches_at_most_four_kernels_and_gives_the_same_bits(rule):
    torch.manual_seed(0)
    online = timm.create_model("resnet50", num_classes=0)
    target = copy.deepcopy(online).requires_grad_(False)
    with torch.no_grad():
        for tensor in online.state_dict().values():
            tensor += torch.randn_like(tensor) if tensor.is_floating_point() else 3
    expected = copy.deepcopy(target)
    one_by_one(online, expected, 0.996, rule)
    assert sum(not buffer.is_floating_point() for buffer in target.buffers()) == 53
    with Launches() as launches:
        ema_update(online, target, 0.996, buffers=rule)
    assert 1 <= len(launches.names) <= 4, launches.names
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
