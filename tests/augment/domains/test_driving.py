"""Weather, Kornia's operations as steps of a view, fine-grained classes and documents."""

import copy
import pickle

import kornia.augmentation as K
import pytest
import torch

from lightning_contrast.augment.domains import document_views, driving_views, fine_grained_views
from lightning_contrast.augment.fused import FusedCloud, FusedFlare, KorniaOperation
from lightning_contrast.testing import HostSyncs
from tests.tolerances import NETWORK, f32

OPERATIONS = {
    "rain": K.RandomRain((20, 20), (2, 6), (-3, 3)),
    "snow": K.RandomSnow((0.3, 0.6), (1.5, 2.5)),
    "motion": K.RandomMotionBlur(5, 90.0, 1.0, border_type="replicate"),
    "jpeg": K.RandomJPEG((40.0, 95.0)),
}
NONE = {"rain": 0.0, "snow": 0.0, "fog": 0.0, "flare": 0.0, "motion": 0.0}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_step_is_the_operation_of_kornia(photos, name):
    """With its parameters, of the selected images only, at the given rate."""
    torch.manual_seed(0)
    images = photos[:, :, :40, :56].float().div(255).repeat(20, 1, 1, 1)
    before = images.clone()
    step = KorniaOperation(OPERATIONS[name], 0.4)
    views = step(images)
    chosen = step._params["chosen"]
    assert chosen.float().mean().item() == pytest.approx(0.4, abs=0.12)
    assert torch.equal(images, before)
    assert torch.equal(views[~chosen], images[~chosen])
    params = {key: step._params[key][chosen] for key in step.names}
    expected = step.operation.apply_transform(images[chosen], params, step.operation.flags, None)
    torch.testing.assert_close(views[chosen], expected.clamp(0, 1), **f32(NETWORK))
    assert (views[chosen] != images[chosen]).flatten(1).any(1).float().mean() > 0.9
    torch.manual_seed(1)
    first = step(images)
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        torch.manual_seed(1)
        assert torch.equal(other(images), first)


def test_making_a_step_draws_nothing():
    state = torch.get_rng_state()
    driving_views(32)
    document_views(32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("weather", NONE)
def test_each_weather_has_its_rate(weather, fused):
    """Of the operations before the colors, seen on a dark square on a darker ground, which all of them change."""
    torch.manual_seed(0)
    images = torch.full((400, 3, 32, 32), 0.2)
    images[:, :, 8:24, 8:24] = 0.3
    for options, rate in ((NONE, 0.0), (NONE | {weather: 0.3}, 0.3)):
        view = images
        for operation in driving_views(32, fused=fused, **options).views[0].operations:
            if isinstance(operation, KorniaOperation | FusedCloud | FusedFlare):
                view = operation(view)
        changed = (view - images).abs().amax((1, 2, 3)) > 1e-3
        assert changed.float().mean().item() == pytest.approx(rate, abs=0.07)


@pytest.mark.parametrize("size", [16, 48, (32, 64)])
@pytest.mark.parametrize("fused", [True, False])
def test_weather_of_any_size_stays_in_range(size, fused):
    torch.manual_seed(0)
    all_of_it = dict.fromkeys(NONE, 1.0)
    views = driving_views(size, fused=fused, **all_of_it)(torch.rand(8, 3, 60, 90))
    shape = (size, size) if isinstance(size, int) else size
    for view in views:
        assert view.shape == (8, 3, *shape)
        assert view.isfinite().all()
        assert 0 <= view.min() <= view.max() <= 1


def test_crops_of_roads_are_wide():
    for size, aspect in ((64, 1.0), ((32, 64), 2.0)):
        crop = driving_views(size).views[0].operations[0]
        assert crop.ratio == pytest.approx((aspect, aspect * 4 / 3))
    assert driving_views(32, channels=1, snow=0.0)(torch.rand(2, 1, 40, 40))[0].shape == (2, 1, 32, 32)
    views = driving_views(32, channels=4, color=False, snow=0.0, rain=0.0)(torch.rand(2, 4, 40, 40))
    assert views[0].shape == (2, 4, 32, 32)


@pytest.mark.slow
def test_nothing_is_read_of_all_weather_and_of_documents():
    for make in (lambda: driving_views(32, **dict.fromkeys(NONE, 1.0)), lambda: document_views(32, jpeg=1.0)):
        policy = make()
        with HostSyncs() as syncs:
            assert all(view.is_meta for view in policy(torch.empty(4, 3, 40, 50, device="meta")))
        assert not syncs.places


def test_the_second_view_of_fine_grained_classes_is_the_safe_one():
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 64).expand(600, 3, 64, 64)
    policy = fine_grained_views(32, hue=0.0)
    shown = []
    for view in policy.views:
        view.operations = view.operations[:1]  # the crop alone
        row = view(ramp)[:, 0]
        shown.append(row.amax((1, 2)) - row.amin((1, 2)))
    assert shown[0].min() < 0.5 < shown[1].min()
    assert (policy.views[0].operations[0].scale, policy.views[1].operations[0].scale) == ((0.2, 1.0), (0.5, 1.0))
    strict = fine_grained_views(32, crop=(0.3, 0.9), safe_crop=(0.6, 1.0), hue=0.02)
    assert [view.operations[0].scale for view in strict.views] == [(0.3, 0.9), (0.6, 1.0)]
    assert strict.views[0].operations[1].hue == 0.02


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.slow
def test_text_stays_text(fused):
    """Dark lines on white stay dark lines: their contrast survives and they stay about horizontal."""
    torch.manual_seed(0)
    page = torch.ones(100, 3, 96, 96)
    for line in range(8, 96, 16):
        page[:, :, line : line + 4, 8:88] = 0.1
    for view in document_views(96, fused=fused)(page):
        gray = view.mean(1)
        contrast = gray.amax((1, 2)) - gray.amin((1, 2))
        assert contrast.median() > 0.5
        middle = gray[:, :, 48]
        assert (middle.amax(1) - middle.amin(1) > 0.3).float().mean() > 0.95
        assert gray.std(1).mean() > 1.5 * gray.std(2).mean()  # lines lie across


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: driving_views(8), ValueError, "`size` must be >= 16 with rain or motion blur"),
        (lambda: driving_views(32, fog=2.0), ValueError, r"`fog` must lie in \[0, 1\]"),
        (lambda: driving_views(32, channels=1), ValueError, "`snow` must be 0 unless"),
        (lambda: driving_views(32, channels=4, color=False, snow=0.0), ValueError, "`rain` must be 0 unless"),
        (lambda: fine_grained_views(32, safe_crop=(1.0, 0.5)), ValueError, "`scale` must be an ordered pair"),
        (lambda: fine_grained_views(32, hue=0.7), ValueError, r"`hue` must lie in \[0, 0.5\]"),
        (lambda: document_views(32, jpeg=-1.0), ValueError, r"`jpeg` must lie in \[0, 1\]"),
        (lambda: document_views(32, rotation=190.0), ValueError, r"`rotation` must lie in \[0, 180\]"),
        (lambda: document_views(32, locations=True), ValueError, "`locations` must be False"),
        (lambda: KorniaOperation(K.RandomGaussianNoise()), ValueError, "some numbers per image.*pre_transform"),
        (lambda: KorniaOperation(K.RandomRain((5, 500))), ValueError, "some numbers per image.*pre_transform"),
        (lambda: KorniaOperation(K.RandomAffine(5.0)), TypeError, "intensity operation of Kornia.*pre_transform"),
        (lambda: KorniaOperation(torch.relu), TypeError, "intensity operation of Kornia"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
