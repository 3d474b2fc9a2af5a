"""Every view policy on the pretended device."""

import pytest
import torch

from lightning_contrast import augment
from lightning_contrast.augment import domains
from tests.device.pretended import OnDevice, PretendedDevice, in_own_process

POLICIES = {name: getattr(augment, name) for name in augment.__all__ if name.endswith("_views")}
POLICIES |= {name: getattr(domains, name) for name in domains.__all__ if name.endswith("_views")}
CHANNELS = {
    "satellite_views": 13,
    "chest_xray_views": 1,
    "ct_views": 1,
    "mri_views": 1,
    "microscopy_views": 5,
}  # other than 3


@pytest.mark.parametrize("backend", [None, "accelerator"])
@pytest.mark.parametrize("name", POLICIES)
@in_own_process
def test_a_policy_reads_nothing_and_gives_the_views_of_the_accelerator_form(name, backend):
    channels = CHANNELS.get(name, 3)
    options = {"mean": [0.5] * channels, "std": [0.2] * channels} | ({"scale": None} if name == "ct_views" else {})
    images = torch.randint(0, 256, (5, channels, 40, 36), dtype=torch.uint8)
    policy = POLICIES[name](size=32, backend=backend, **options)
    if isinstance(policy, augment.ClipPolicy):
        images = torch.randint(0, 256, (2, policy.span, 3, 40, 36), dtype=torch.uint8)
    for given in (images, images / 255):
        torch.manual_seed(0)
        with PretendedDevice() as pretended:
            there = given.to(pretended.device)
            views = policy(there)
            plain = policy.eval_transform(there)
        torch.manual_seed(0)
        same = POLICIES[name](size=32, backend="accelerator", **options)(given)
        for view, other in zip(views, same, strict=True):
            assert isinstance(view, OnDevice)
            torch.testing.assert_close(view.host, other)
        assert isinstance(plain, OnDevice)
