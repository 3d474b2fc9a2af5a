"""Optimizers and clipping on the pretended device: no read, and the weights of the CPU."""

import pytest
import torch
from torch import nn

from lightning_contrast.optim import LARS, build_optimizer, clip_each_gradient, clip_gradients_together
from tests.device.pretended import PretendedDevice, in_own_process

CLIPS = {"each": clip_each_gradient, "together": clip_gradients_together}


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def _train(device, make, clip):
    net = _network().to(device)
    optimizer = make(net)
    images = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(3):
        optimizer.zero_grad()
        net(images).square().sum().backward()
        if clip:
            CLIPS[clip](net.parameters(), 0.5)
        optimizer.step()
    return net


def _built(name):
    return lambda net: build_optimizer(name, [{"params": list(net.parameters()), "weight_decay": 0.1}], lr=0.1)


MAKERS = {
    "LARS": lambda net: LARS(net.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-4),
    "LARS clipped": lambda net: LARS(net.parameters(), 0.5, trust_form="B", clip=True, lr_in_momentum=True),
    "built sgd": _built("sgd"),
    "built adamw": _built("adamw"),
    "built lars": _built("lars"),
}


@pytest.mark.parametrize("clip", [None, *CLIPS])
@pytest.mark.parametrize("name", MAKERS)
@in_own_process
def test_a_step_reads_nothing_and_gives_the_weights_of_the_cpu(name, clip):
    with PretendedDevice() as pretended:
        ours = _train(pretended.device, MAKERS[name], clip)
    theirs = _train(torch.device("cpu"), MAKERS[name], clip)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.host, b)
