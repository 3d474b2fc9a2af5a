"""Uneven light, clouds, fog and flare: distributions, values, bad inputs."""

import math

import pytest
import torch

from lightning_contrast.augment.fused import FusedCloud, FusedFlare, FusedShading
from lightning_contrast.augment.fused.fields import smooth_field
from tests.tolerances import FORMULA, NETWORK, bound, f32


def test_a_field_goes_through_its_points():
    points = torch.rand(2, 3, 3)
    field = smooth_field(points, (9, 13))[:, 0]
    torch.testing.assert_close(field[:, ::4, ::6], points, **f32(FORMULA))
    flat = smooth_field(torch.full((1, 4, 4), 0.3), (5, 7))
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3), **f32(FORMULA))


def test_shading_has_the_given_rate_and_range():
    """At a corner, where a control point is, the logarithm of the factor is uniform; all channels have the same."""
    torch.manual_seed(0)
    images = torch.full((4000, 2, 6, 10), 0.4)
    factor = FusedShading(0.6, 0.3)(images) / 0.4
    torch.testing.assert_close(factor[:, 0], factor[:, 1], **f32(FORMULA))
    corner = factor[:, 0, 0, 0].log()
    shaded = corner != 0
    assert shaded.float().mean().item() == pytest.approx(0.6, abs=0.03)
    quartiles = corner[shaded].quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([-0.15, 0.0, 0.15]), atol=0.02, rtol=0)
    assert 0.29 < corner.abs().max() < 0.3001
    other = factor[:, 0, -1, -1].log()
    assert torch.corrcoef(torch.stack([corner[shaded], other[shaded]]))[0, 1].abs() < 0.07
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(FusedShading(1.0, 0.0)(images), images)


def test_two_points_make_a_gradient():
    torch.manual_seed(0)
    factor = FusedShading(1.0, 0.2, points=2)(torch.full((50, 1, 9, 9), 0.5)).log()
    across = factor.diff(dim=-1)
    assert ((across >= 0).all(-1) | (across <= 0).all(-1)).all()  # from one edge to the other


@pytest.mark.parametrize("cover", [(0.2, 0.2), (0.5, 0.5), (0.1, 0.6)])
def test_clouds_cover_the_given_share(cover):
    torch.manual_seed(0)
    images = torch.full((800, 3, 48, 64), 0.1)
    views = FusedCloud(0.5, cover, (0.8, 0.8), value=0.9)(images)
    clouded = (views != images).flatten(1).any(1)
    assert clouded.float().mean().item() == pytest.approx(0.5, abs=0.06)
    alpha = ((views - 0.1) / 0.8)[clouded, 0]
    torch.testing.assert_close(views[:, 0], views[:, 2])
    assert alpha.min() >= -bound(FORMULA)
    assert alpha.max().item() == pytest.approx(0.8, abs=1e-3)
    share = (alpha >= 0.4).float().mean((1, 2))
    assert share.mean().item() == pytest.approx(sum(cover) / 2, abs=0.05)
    assert share.std() > 0.08 if cover[0] < cover[1] else share.std() < 0.1
    assert alpha.diff(dim=-1).abs().amax() < 0.5  # soft edges


def test_fog_is_everywhere():
    torch.manual_seed(0)
    images = torch.zeros(300, 1, 32, 32)
    fog = FusedCloud(1.0, (1.0, 1.0), (0.2, 0.6), value=1.0, softness=4.0)(images)[:, 0]
    least, most = fog.amin((1, 2)), fog.amax((1, 2))
    assert least.min() > 0.08
    assert 0.5 < most.max() <= 0.6
    assert (most < 3 * least).all()
    assert (most > 1.1 * least).all()


def test_flare_has_the_given_rate_and_strength():
    torch.manual_seed(0)
    images = torch.zeros(1000, 3, 32, 64)
    views = FusedFlare(0.3, (0.5, 0.9), (0.1, 0.2))(images)
    flared = views.flatten(1).any(1)
    assert flared.float().mean().item() == pytest.approx(0.3, abs=0.05)
    brightest = views[flared].amax((1, 2, 3))
    assert 0.45 < brightest.min() < brightest.max() < 0.93
    place = views[flared, 0].flatten(1).argmax(1)
    row, column = (place // 64).float() / 32, (place % 64).float() / 64
    for where in (row, column):  # anywhere
        torch.testing.assert_close(
            where.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.25, 0.5, 0.75]), atol=0.1, rtol=0
        )
    assert (FusedFlare(1.0)(torch.ones(4, 1, 8, 8)) == 1).all()


def test_the_glow_is_a_gaussian_on_a_screen():
    torch.manual_seed(0)
    operation = FusedFlare(1.0, (0.5, 0.5), (0.1, 0.1))
    views = operation(torch.full((6, 1, 40, 50), 0.3))[:, 0]
    rows, columns = torch.arange(40.0)[:, None] + 0.5, torch.arange(50.0) + 0.5
    for view, spots in zip(views, operation._params["spots"], strict=True):
        dark = torch.ones(40, 50)
        for number, (row, column, radius, light) in enumerate(spots):
            distance = ((rows - row) ** 2 + (columns - column) ** 2).sqrt()
            spot = torch.exp(-((distance / radius) ** 2) / 2) if number == 0 else (radius + 0.5 - distance).clamp(0, 1)
            dark *= 1 - light * spot
        torch.testing.assert_close(view, 1 - 0.7 * dark, **f32(NETWORK))
        assert spots[0, 2:].tolist() == pytest.approx([4.0, 0.5])
        source, ghosts = spots[0, :2] - torch.tensor([20.0, 25.0]), spots[1:, :2] - torch.tensor([20.0, 25.0])
        turned = source[0] * ghosts[:, 1] - source[1] * ghosts[:, 0]  # on a line through the center
        assert turned.abs().max() < 1e-3 * math.hypot(40, 50) ** 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedShading(2.0), r"`p` must lie in \[0, 1\]"),
        (lambda: FusedShading(strength=-1), "`strength` must be >= 0"),
        (lambda: FusedShading(points=1), "`points` must be >= 2"),
        (lambda: FusedCloud(cover=(0.5, 0.2)), "`cover` must be an ordered pair"),
        (lambda: FusedCloud(opacity=(0.5, 1.2)), "`opacity` must be an ordered pair"),
        (lambda: FusedCloud(softness=0), "`softness` must be > 0|`softness` must be above 0"),
        (lambda: FusedCloud(value=2), r"`value` must lie in \[0, 1\]"),
        (lambda: FusedFlare(strength=(0.5, 2.0)), "`strength` must be an ordered pair"),
        (lambda: FusedFlare(radius=(0.0, 0.2)), "`radius` must be an ordered pair"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
