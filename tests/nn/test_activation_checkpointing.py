"""Layers that are computed twice: the same run in less memory, and averages that do not notice."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.nn import checkpoint_activations


def network():
    torch.manual_seed(0)
    stage = [nn.Sequential(nn.Conv2d(n, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)) for n in (3, 4, 4)]
    return nn.Sequential(nn.Sequential(*stage), nn.Flatten(), nn.Linear(4 * 36, 5))


def train(net, steps=3):
    """Return gradients of the last step and the state after some steps of SGD."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(6, 3, 12, 12)).square().mean().backward()
        optimizer.step()
    return [p.grad for p in net.parameters()], net.state_dict()


def saved_bytes(net):
    """Return how much autograd keeps of a forward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(6, 3, 12, 12))
    return sum(kept.values())


@pytest.mark.parametrize("layers", [None, ["0"], ["0.0", "0.2.1"]])
def test_gradients_weights_and_averages_are_those_of_the_plain_network(layers):
    plain, again = network(), checkpoint_activations(network(), layers)
    (expected, state), (found, same) = train(plain), train(again)
    assert state.keys() == same.keys()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert same["0.0.1.num_batches_tracked"] == 3


def test_it_keeps_less():
    assert saved_bytes(checkpoint_activations(network(), ["0"])) < 0.5 * saved_bytes(network())


@pytest.mark.parametrize("backend", ["resnet", "vit"])
def test_the_blocks_of_timms_networks_are_found(backend):
    net = timm.create_model(f"test_{backend}", num_classes=0)
    checkpoint_activations(net)
    containers = [net.layer1, net.layer2, net.layer3, net.layer4] if backend == "resnet" else [net.blocks]
    blocks = [block for container in containers for block in container]
    assert all("forward" in block.__dict__ for block in blocks)
    assert sum("forward" in module.__dict__ for module in net.modules()) == len(blocks)


def test_copies_have_their_own_weights_and_a_second_call_changes_nothing():
    net = checkpoint_activations(network())
    before = net[0].__dict__["forward"]
    assert checkpoint_activations(net)[0].__dict__["forward"] is before
    images = torch.randn(2, 3, 12, 12)
    expected = net.eval()(images)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not other(images).any()
    assert torch.equal(net(images), expected)


def test_momentum_networks_of_a_checkpointed_backbone_are_their_own():
    model = lc.MoCo(checkpoint_activations(network()), feature_dim=5, queue_size=8, projection_dim=4)
    own = model.momentum_backbone[0].__dict__["forward"].layer
    assert own is model.momentum_backbone[0]
    assert own is not model.backbone[0]


@pytest.mark.parametrize(
    ("make", "layers", "error", "message"),
    [
        (network, ["0.9"], ValueError, "`layers` must be one of"),
        (lambda: nn.Linear(2, 2), None, ValueError, "`layers` must be named: Linear has no container of blocks"),
        (lambda: "resnet18", None, TypeError, "`module` must be an nn.Module, got 'str'"),
    ],
)
def test_what_is_refused(make, layers, error, message):
    with pytest.raises(error, match=message):
        checkpoint_activations(make(), layers)
