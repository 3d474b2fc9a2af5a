"""LARS and the parameter groups under FSDP: two ranks that hold parts of the tensors equal one that holds all."""

import pytest
import torch
from torch import nn

from lightning_contrast.optim import LARS, parameter_groups
from tests.launch import run_processes
from tests.tolerances import NETWORK, f64

STEPS = 3


def make_network():
    """Tensors that do not divide evenly, and one that leaves a rank with nothing."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 1, bias=False)
    ).double()


def train(network, form, parameters=None):
    """Take a few steps on one batch that is the same on every rank."""
    groups = parameter_groups(network, 0.1)
    optimizer = LARS(groups, lr=0.5, trust_coefficient=0.1, trust_form=form)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (network(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    return optimizer, [len(group["params"]) for group in groups]


def unsharded(form):
    network = make_network()
    _, sizes = train(network, form)
    return {name: p.detach() for name, p in network.named_parameters()}, sizes


def check(results, form):
    expected, sizes = unsharded(form)
    start = dict(make_network().named_parameters())
    for weights, rank_sizes, is_smaller in results:
        assert is_smaller  # or nothing was sharded and the test shows nothing
        assert rank_sizes == sizes
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, **f64(NETWORK))
            assert not torch.allclose(value, start[name].detach())


@pytest.mark.dist
@pytest.mark.parametrize("form", ["A", "B"])
def test_fsdp2_equals_one_process(form):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        network = make_network()
        for layer in network:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
        optimizer, sizes = train(network, form)
        weights = {name: p.full_tensor().detach() for name, p in network.named_parameters()}
        smaller = sum(p.to_local().numel() for p in network.parameters()) < sum(w.numel() for w in weights.values())
        state = get_optimizer_state_dict(network, optimizer)["state"]
        assert all(s["momentum_buffer"].placements == network[0].weight.placements for s in state.values())
        return weights, sizes, smaller

    check(run_processes(run, 2), form)


@pytest.mark.dist
@pytest.mark.parametrize("form", ["A", "B"])
@pytest.mark.parametrize("whole", [True, False], ids=["one flat tensor", "one a layer"])
def test_fsdp1_equals_one_process(form, whole):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def run(rank):
        policy = None if whole else ModuleWrapPolicy({nn.Linear})
        network = FSDP(make_network(), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
        _, sizes = train(network, form)
        local = sum(p.numel() for p in network.parameters())
        with FSDP.summon_full_params(network):
            weights = {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in network.named_parameters()
            }
        return weights, sizes, local < sum(w.numel() for w in weights.values())

    check(run_processes(run, 2), form)


@pytest.mark.dist
def test_flat_parameters_of_fsdp1_are_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    def run(rank):
        network = FSDP(make_network(), use_orig_params=False, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="`use_orig_params` must be True"):
            parameter_groups(network, 0.1)

    run_processes(run, 2)
