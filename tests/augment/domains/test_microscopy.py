"""Views of fluorescence channels and of parts: gains, dropped channels, orientations, small defects, bad inputs."""

import pytest
import torch

from lightning_contrast.augment.domains import industrial_views, microscopy_views
from lightning_contrast.augment.fused import FusedBandGain
from tests.tolerances import CONVERGED


def test_every_channel_has_its_own_gain():
    torch.manual_seed(0)
    images = torch.full((4000, 5, 2, 2), 0.5)
    images[:, 4] = 0.95
    factors = FusedBandGain(5, 0.2)(images)[:, :, 0, 0] / images[:, :, 0, 0]
    quartiles = factors[:, :4].quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)
    torch.testing.assert_close(quartiles, torch.tensor([[0.9], [1.0], [1.1]]).expand(3, 4), atol=0.015, rtol=0)
    assert 0.799 < factors.min() < 0.81
    assert 1.19 < factors.max() < 1.201
    assert factors[:, 4].max() <= 1.06  # clipped at 1
    assert (torch.corrcoef(factors[:, :4].T) - torch.eye(4)).abs().max() < 0.1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("channels", [2, 5])
def test_dropped_channels_become_zero_and_one_stays(channels, fused):
    torch.manual_seed(0)
    options = {"mean": [0.2] * channels, "std": [0.1] * channels, "channels": channels, "fused": fused}
    counts = []
    for view in microscopy_views(8, drop=1.0, **options)(0.5 + torch.rand(200, channels, 10, 10) / 2):
        counts.append((view.abs().amax((2, 3)) < 10 * CONVERGED).sum(1))
    assert torch.cat(counts).unique().tolist() == list(range(1, channels))


@pytest.mark.parametrize("fused", [True, False])
def test_a_small_defect_of_a_part_stays_visible(fused):
    """A scratch of one pixel of 64 keeps at least half of its contrast wherever the crop has it."""
    torch.manual_seed(0)
    images = torch.full((100, 3, 64, 64), 0.4)
    images[:, :, 32] = 0.8
    for view in industrial_views(64, fused=fused)(images):
        luma = view.mean(1)
        contrast = luma.amax((1, 2)) - luma.amin((1, 2))
        assert contrast.median() > 0.25
        assert (contrast > 0.15).float().mean() > 0.9


def test_parts_turn_only_if_told():
    torch.manual_seed(0)
    images = torch.zeros(400, 3, 16, 16)
    images[:, :, :4, :4] = 1  # a mark at the upper left corner

    def corners(policy):
        view = policy(images)[0].mean(1)
        corner = torch.stack([view[:, i, j] for i in (0, -1) for j in (0, -1)], 1)
        return torch.bincount(corner.argmax(1)[corner.amax(1) > 0.5], minlength=4)

    still = corners(industrial_views(16, crop=(0.9, 1.0)))
    assert still[0] > 300
    assert not still[1:].any()
    assert corners(industrial_views(16, crop=(0.9, 1.0), turns=True)).min() > 60
    flipped = corners(industrial_views(16, crop=(0.9, 1.0), flip=0.5))
    assert flipped[:2].min() > 120
    assert not flipped[2:].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: microscopy_views(8)(torch.rand(1, 4, 8, 8)), "have 5 channels.*channels=4"),
        (lambda: microscopy_views(8, channels=1, drop=0.5), "`channels` must be >= 2"),
        (lambda: microscopy_views(8, gain=2), r"`gain` must lie in \[0, 1\]"),
        (lambda: microscopy_views(8, drop=-1), r"`drop` must lie in \[0, 1\]"),
        (lambda: industrial_views(8, flip=2), r"`flip` must lie in \[0, 1\]"),
        (lambda: industrial_views(8, turns=True, locations=True), "`locations` must be False"),
        (lambda: FusedBandGain(3)(torch.rand(1, 4, 2, 2)), "have 3 bands"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
