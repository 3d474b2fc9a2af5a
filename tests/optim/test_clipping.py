"""Clipping of each gradient on its own or of all together, against plain loops, also where ranks hold parts of them."""

import pytest
import torch
from torch import nn

from lightning_contrast.optim import clip_each_gradient, clip_gradients_together
from tests.launch import run_processes
from tests.tolerances import near

MAX_NORM = 3.0


def make_network():
    """Tensors that do not divide evenly over two ranks, one of them smaller than their number."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 1, bias=False)).double()


def backward(network):
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (network(x) - x.sum(1, keepdim=True)).square().mean().mul(3).backward()


def expected():
    network = make_network()
    backward(network)
    clipped, shortened = {}, 0
    for name, parameter in network.named_parameters():
        norm = sum(value**2 for value in parameter.grad.flatten().tolist()) ** 0.5
        factor = MAX_NORM / (norm + 1e-6)
        shortened += factor < 1
        clipped[name] = parameter.grad * factor if factor < 1 else parameter.grad
    assert 0 < shortened < len(clipped)  # both ways occur
    return clipped


def expected_together():
    network = make_network()
    backward(network)
    squares = [value**2 for p in network.parameters() for value in p.grad.flatten().tolist()]
    factor = MAX_NORM / (sum(squares) ** 0.5 + 1e-6)
    assert factor < 1
    return {name: parameter.grad * factor for name, parameter in network.named_parameters()}


both = pytest.mark.parametrize(
    ("clip", "expected"), [(clip_each_gradient, expected), (clip_gradients_together, expected_together)]
)


@both
def test_it_equals_a_plain_loop(clip, expected):
    network = make_network()
    backward(network)
    clip(network.parameters(), MAX_NORM)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected()[name])


def test_a_norm_below_the_limit_changes_nothing_and_kinds_count_together():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)
    clip_gradients_together([a, b], 5.1)
    assert (a.grad.item(), b.grad.item()) == (3.0, 4.0)
    clip_gradients_together([a, b], 1.0)
    assert (a.grad.item(), b.grad.item()) == near((0.6, 0.8))
    clip_gradients_together([nn.Parameter(torch.ones(1))], 1.0)


def test_without_gradients_and_in_half_precision():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, dtype=torch.float16))
    clip_each_gradient([a, b], 1.0)
    assert a.grad is None
    b.grad = torch.full((4,), 300.0, dtype=torch.float16)  # whose squares float16 cannot hold
    clip_each_gradient([a, b], 1.0)
    torch.testing.assert_close(b.grad, torch.full((4,), 0.5, dtype=torch.float16))


@both
@pytest.mark.dist
def test_fsdp2_equals_one_process(clip, expected):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        network = make_network()
        for layer in network:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
        backward(network)
        assert network[0].weight.to_local().numel() < 15
        clip(network.parameters(), MAX_NORM)
        return {name: p.grad.full_tensor() for name, p in network.named_parameters()}

    for gradients in run_processes(run, 2):
        for name, gradient in expected().items():
            torch.testing.assert_close(gradients[name], gradient)


@both
@pytest.mark.dist
def test_fsdp1_equals_one_process(clip, expected):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    def run(rank):
        network = FSDP(make_network(), use_orig_params=True, device_id=torch.device("cpu"))
        backward(network)
        clip(network.parameters(), MAX_NORM)
        with FSDP.summon_full_params(network, with_grads=True):
            return {n.removeprefix("_fsdp_wrapped_module."): p.grad.clone() for n, p in network.named_parameters()}

    for gradients in run_processes(run, 2):
        for name, gradient in expected().items():
            torch.testing.assert_close(gradients[name], gradient)


@both
def test_bad_norm_is_named(clip, expected):
    with pytest.raises(ValueError, match="`max_norm` must be > 0, got 0"):
        clip([], 0)
