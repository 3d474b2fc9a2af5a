"""BatchNorm in splits against one ordinary BatchNorm for each part."""

import copy

import pytest
import torch
from torch import nn

from lightning_contrast.nn import SplitBatchNorm2d, build_backbone, convert_split_batchnorm


def make(splits, momentum=0.1):
    torch.manual_seed(0)
    norm = SplitBatchNorm2d(5, splits, momentum=momentum).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_training_equals_one_batchnorm_for_each_part(splits, momentum):
    norm = make(splits, momentum)
    plain = nn.BatchNorm2d(5, momentum=momentum).double()
    plain.load_state_dict(norm.state_dict())
    devices = [copy.deepcopy(plain) for _ in range(splits)]
    for step in range(3):
        x = torch.randn(8, 5, 3, 3, dtype=torch.float64, requires_grad=True) * (step + 1)
        expected = torch.empty_like(x)
        for part, device in enumerate(devices):
            expected[part::splits] = device(x[part::splits])
        torch.testing.assert_close(norm(x), expected)
        means = torch.stack([device.running_mean for device in devices]).mean(0)
        variances = torch.stack([device.running_var for device in devices]).mean(0)
        torch.testing.assert_close(norm.running_mean, means)
        torch.testing.assert_close(norm.running_var, variances)
        for device in devices:  # the parts meet after every step, as the running statistics are one
            device.running_mean.copy_(means)
            device.running_var.copy_(variances)
    assert norm.num_batches_tracked == 3


def test_gradients_equal():
    norm = make(4)
    plain = nn.BatchNorm2d(5).double()
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(8, 5, 3, 3, dtype=torch.float64)
    weights = torch.randn_like(x)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (norm(a) * weights).sum().backward()
    sum((plain(b[part::4]) * weights[part::4]).sum() for part in range(4)).backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad)
    torch.testing.assert_close(norm.bias.grad, plain.bias.grad)


def test_evaluation_uses_the_running_statistics_at_any_batch_size():
    norm = make(4)
    norm(torch.randn(8, 5, 3, 3, dtype=torch.float64))
    norm.eval()
    x = torch.randn(3, 5, 2, 2, dtype=torch.float64)
    stats = [t.view(1, 5, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    torch.testing.assert_close(norm(x), (x - stats[0]) / (stats[1] + 1e-5).sqrt() * stats[2] + stats[3])


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_convert_keeps_parameters_and_evaluation(name):
    torch.manual_seed(0)
    network = build_backbone(name, small_images=True).module
    network(torch.randn(4, 3, 32, 32))
    x = torch.randn(3, 3, 32, 32)
    expected = network.eval()(x)
    parameters = list(network.parameters())
    converted = convert_split_batchnorm(network, 2)
    assert converted is network
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert not network.training
    torch.testing.assert_close(network(x), expected)
    kinds = {type(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds == {SplitBatchNorm2d}
    network.train()
    halves = torch.randn(4, 3, 32, 32).repeat_interleave(2, 0)  # the same four images in both parts
    torch.testing.assert_close(network(halves)[0::2], network(halves)[1::2])


def test_convert_a_layer_itself():
    assert isinstance(convert_split_batchnorm(nn.BatchNorm2d(3), 2), SplitBatchNorm2d)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`splits` must be >= 1, got 0"):
        SplitBatchNorm2d(3, 0)
    with pytest.raises(ValueError, match="`splits` must divide the batch of 6, got 4"):
        SplitBatchNorm2d(3, 4)(torch.randn(6, 3, 2, 2))
    with pytest.raises(ValueError, match="expected 4D input"):
        SplitBatchNorm2d(3, 2)(torch.randn(6, 3))
