"""Windows, deformations and the views of gray medical images."""

import functools

import kornia
import pytest
import torch

from lightning_contrast import augment
from lightning_contrast.augment.domains import chest_xray_views, ct_views, mri_views
from lightning_contrast.augment.fused import FusedDeform, FusedWindow
from tests.tolerances import CONVERGED, FORMULA, FOUR_DIGITS, NETWORK, f32


def test_a_window_without_jitter_is_a_clipped_line():
    images = torch.linspace(0, 1, 64).view(1, 1, 8, 8).expand(3, -1, -1, -1)
    still = FusedWindow((0.2, 0.6), jitter=0, gamma=(1, 1), shift=0)(images)
    torch.testing.assert_close(still, ((images - 0.2) / 0.4).clamp(0, 1), **f32(FORMULA))
    never = FusedWindow((0.2, 0.6), p=0.0)(images)
    assert torch.equal(never, still)


def test_windows_have_the_given_ranges():
    """Of 0 at the lower limit and 1 at the upper one: both move, uniformly, at the given rate."""
    torch.manual_seed(0)
    draw = FusedWindow((0.2, 0.6), jitter=0.1, gamma=(0.5, 2.0), shift=0.1, p=0.5).draw(8000, 4, 4)
    center, width = torch.from_numpy(draw["low"] + draw["width"] / 2), torch.from_numpy(draw["width"])
    gamma, shift = torch.from_numpy(draw["gamma"]), torch.from_numpy(draw["shift"])
    changed = gamma != 1
    assert changed.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(changed, shift != 0)
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    for values, expected in (
        (center, (0.38, 0.4, 0.42)),
        (width, (0.38, 0.4, 0.42)),
        (gamma.log2(), (-0.5, 0.0, 0.5)),
        (shift, (-0.05, 0.0, 0.05)),
    ):
        torch.testing.assert_close(values[changed].quantile(quartiles), torch.tensor(expected), atol=0.03, rtol=0)
    assert 0.4 - 0.0401 < center.min() < 0.365 < 0.435 < center.max() < 0.4401
    assert (center[~changed] - 0.4).abs().max() < CONVERGED > (width[~changed] - 0.4).abs().max()


def test_gamma_and_shift_are_applied_in_the_window():
    torch.manual_seed(0)
    images = torch.rand(20, 2, 4, 4)
    operation = FusedWindow((0.2, 0.8), jitter=0.1, gamma=(0.5, 2.0), shift=0.2)
    views, params = operation(images), operation._params
    low, width, gamma, shift = (params[name].view(-1, 1, 1, 1) for name in ("low", "width", "gamma", "shift"))
    expected = (((images - low) / width).clamp(0, 1) ** gamma + shift).clamp(0, 1)
    torch.testing.assert_close(views, expected, **f32(NETWORK))


def test_gamma_equals_kornia():
    torch.manual_seed(0)
    images = torch.rand(20, 1, 4, 4)
    operation = FusedWindow(jitter=0, gamma=(0.5, 2.0), shift=0)
    views = operation(images)
    expected = kornia.enhance.adjust_gamma(images, operation._params["gamma"])
    torch.testing.assert_close(views, expected, **f32(FORMULA))


@pytest.mark.parametrize("width", [20, 34])
def test_rotation_equals_kornia(width):
    torch.manual_seed(0)
    images = torch.rand(16, 1, 20, width)
    operation = FusedDeform(30.0, 0.0)
    views = operation(images)
    degrees = operation._params["angle"].rad2deg()
    assert degrees.abs().max() <= 30
    assert degrees.min() < -15 < 15 < degrees.max()
    expected = kornia.geometry.rotate(images, degrees, padding_mode="border", align_corners=True)
    torch.testing.assert_close(views, expected, atol=1e-3, rtol=0)


def test_deformation_moves_by_its_control_points():
    """On ramps along both axes the change of the value is the displacement; without any nothing changes."""
    torch.manual_seed(0)
    edge = 64
    line = (torch.arange(edge) + 0.5) / edge
    ramps = torch.stack([line.expand(edge, edge), line[:, None].expand(edge, edge)]).expand(40, -1, -1, -1)
    operation = FusedDeform(0.0, 0.05, points=4, p=0.5)
    moved = operation(ramps) - ramps
    deformed, field = operation._params["deformed"], operation._params["field"]
    assert not moved[~deformed].any()
    inside = moved[deformed][:, :, 8:-8, 8:-8]
    assert 0.04 < inside.abs().max() < 0.075  # bicubic overshoots
    between = torch.nn.functional.interpolate(field[deformed], (edge, edge), mode="bicubic", align_corners=True)
    torch.testing.assert_close(inside, between[:, :, 8:-8, 8:-8], **f32(NETWORK))
    assert torch.equal(FusedDeform(0.0, 0.0, p=0.0)(ramps), ramps)


STILL_COIL = functools.partial(mri_views, bias=0.0)  # a bias field can be brighter on the other side


@pytest.mark.parametrize("make", [chest_xray_views, ct_views, STILL_COIL])
@pytest.mark.parametrize("fused", [True, False])
def test_the_marked_side_stays(make, fused):
    """A mark on the left stays there: no view is mirrored."""
    torch.manual_seed(0)
    images = torch.full((200, 1, 32, 32), 0.25)
    images[:, :, :, :16] = 0.3
    policy = make(32, fused=fused, scale=None)
    for view in policy(images):
        left, right = view[..., :16].mean((1, 2, 3)), view[..., 16:].mean((1, 2, 3))
        assert (left >= right - FOUR_DIGITS).all()
        assert (left > right + 1e-3).float().mean() > 0.5
    flipped = make(32, fused=fused, scale=None, flip=0.5)(images)[0]
    assert (flipped[..., :16].mean((1, 2, 3)) < flipped[..., 16:].mean((1, 2, 3)) - 1e-3).float().mean() > 0.2


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.slow
def test_a_bias_field_of_mri_is_smooth_and_has_the_given_rate(fused):
    """Seen on a constant slice: twice the same factor nowhere, but nearly that of the next pixel."""
    torch.manual_seed(0)
    policy = mri_views(32, bias=0.3, gamma=(1.0, 1.0), fused=fused)
    plain = mri_views(32, bias=0.0, gamma=(1.0, 1.0), fused=fused)
    images = torch.full((1500, 1, 32, 32), 0.4)
    view, without = policy(images)[0], plain(images)[0]
    assert (without.amax((1, 2, 3)) - without.amin((1, 2, 3))).max() < 1e-3
    spread = view.amax((1, 2, 3)) - view.amin((1, 2, 3))
    shaded = spread > 1e-3
    assert shaded.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (view.diff(dim=-1).abs().amax((1, 2, 3)) < 0.15 * spread)[shaded].all()


@pytest.mark.parametrize("make", [chest_xray_views, ct_views, mri_views])
@pytest.mark.parametrize("fused", [True, False])
def test_masking_is_off_unless_given(make, fused):
    torch.manual_seed(0)
    images = torch.full((400, 1, 32, 32), 0.3)
    options = {"fused": fused, "mean": [0.5], "std": [0.1]}
    for erase, rate in ((0.0, 0.0), (0.5, 0.5)):
        view = make(32, erase=erase, **options | ({"scale": None} if make is ct_views else {}))(images)[0]
        masked = (view.abs() < 1e-3).flatten(1).float().mean(1)
        erased = (masked > 0.015) & (masked < 0.13)
        assert erased.float().mean().item() == pytest.approx(rate, abs=0.08)


@pytest.mark.parametrize(("window", "low", "high"), [("lung", -1350, 150), ("soft", -160, 240), ("bone", -500, 1300)])
def test_windows_of_hounsfield_units(window, low, high):
    units = torch.linspace(-1024, 3071, 16 * 16).round().to(torch.int16).view(1, 1, 16, 16)
    for scale in ((-1024, 3071), (-2000, 4000)):
        plain = ct_views(16, window=window, scale=scale).eval_transform(units)
        torch.testing.assert_close(plain, ((units - low) / (high - low)).clamp(0, 1), **f32(NETWORK))
    policy = ct_views(16, window=window)
    assert policy.views[0].operations[2].window == policy.window
    assert policy.scale == (-1024, 3071)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ct_views(8, window="liver"), "`window` must be one of"),
        (lambda: chest_xray_views(8, gamma=(0, 1)), "`gamma` must start above 0"),
        (lambda: mri_views(8, gamma=(2, 1)), "`gamma` must be an ordered pair"),
        (lambda: mri_views(8)(torch.rand(1, 3, 8, 8)), "have 1 channels.*channels=3"),
        (lambda: mri_views(8, locations=True), "`locations` must be False"),
        (lambda: mri_views(8, bias=-0.1), "`bias` must be >= 0"),
        (lambda: chest_xray_views(8, erase=2.0), r"`erase_p` must lie in \[0, 1\]"),
        (lambda: FusedWindow((0.5, 0.5)), "`window` must be a pair"),
        (lambda: FusedWindow(jitter=1.0), r"`jitter` must lie in \[0, 1\)"),
        (lambda: FusedWindow(shift=2), r"`shift` must lie in \[0, 1\]"),
        (lambda: FusedDeform(200), r"`degrees` must lie in \[0, 180\]"),
        (lambda: FusedDeform(displacement=0.6), r"`displacement` must lie in \[0, 0.5\]"),
        (lambda: FusedDeform(points=1), "`points` must be >= 2"),
        (lambda: augment.make_policy([augment.ViewSpec(8, (0.5, 1))], window=(2, 0)), "`window` must be a pair"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
