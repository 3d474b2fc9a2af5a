"""Channels-last weights: what they must not change, and where they must be given up."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightning_contrast.nn import build_backbone
from tests.launch import run_processes
from tests.tolerances import NETWORK, f32


@pytest.mark.parametrize("name", ["resnet18", "small_convnet"])
def test_convolutions_of_a_named_network_are_channels_last_and_its_values_are_timms(name):
    network = build_backbone(name, small_images=name == "resnet18").module
    kernels = [w for w in network.parameters() if w.ndim == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
    images = torch.rand(4, 3, 32, 32)
    network.eval()
    expected = network(images)
    network.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(network(images), expected, **f32(NETWORK, size=0.1))


def test_modules_of_the_user_and_transformers_keep_their_memory_format():
    own = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten())
    assert build_backbone(own, feature_dim=8).module[0].weight.is_contiguous()
    kwargs = {"img_size": 32, "patch_size": 4, "depth": 1}
    vit = build_backbone("vit_tiny_patch16_224", backbone_kwargs=kwargs).module
    assert all(w.is_contiguous() for w in vit.parameters())


def _ddp_step(rank):
    torch.manual_seed(0)
    network = DistributedDataParallel(build_backbone("resnet10t", small_images=True).module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            network(torch.rand(2, 3, 32, 32)).sum().backward()
    dist.barrier()
    return [str(warning.message) for warning in caught]


@pytest.mark.dist
@pytest.mark.slow
def test_ddp_finds_the_strides_of_its_buckets():
    assert [m for told in run_processes(_ddp_step, 2) for m in told if "strides" in m] == []
