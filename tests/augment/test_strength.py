"""The strength of a policy: at 1 its own views bit for bit, at 0 the whole image, and between them in between."""

import copy

import pytest
import torch

from lightning_contrast import augment
from lightning_contrast.augment import StrengthSchedule, ViewPolicy, ViewSpec
from tests.augment.test_policies import POLICIES, fitting
from tests.tolerances import FORMULA, f32


def views_of(policy, images, seed=0):
    torch.manual_seed(seed)
    return policy(images)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("fused", [True, False])
def test_every_policy_at_full_strength_is_itself_and_weaker_towards_the_whole_image(name, fused, photos):
    options = {} if fused or name != "vicregl_views" else {"locations": False}
    policy = POLICIES[name](24, fused=fused, **options)
    images = fitting(name, photos)[..., :100]  # square, like the views: a whole image is not stretched
    own = views_of(policy, images)
    policy.set_strength(0.3)
    policy.set_strength(1.0)
    for view, again in zip(own, views_of(policy, images), strict=True):
        assert torch.equal(view, again)
    policy.set_strength(0.0)
    assert policy.strength == 0
    for view in views_of(policy, images)[: 2 if fused else 0]:
        pixels = view.as_subclass(torch.Tensor)
        size = pixels.shape[-1]
        whole = policy.eval_transform(images)
        whole = torch.nn.functional.interpolate(whole, (size, size), mode="area") if size != 24 else whole
        poses = [pose.rot90(turns, (2, 3)) for pose in (pixels, pixels.flip(3)) for turns in range(4)]
        differences = [(pose - whole).abs().mean((1, 2, 3)) for pose in poses]  # flipped and turned, for some policies
        assert torch.stack(differences).amin(0).max() < 0.05 / min(policy.std)


def spreads(strength, **changes):
    """Return how far views are from the whole image: by color, and by the share of the area that they show."""
    spec = ViewSpec(16, (0.1, 1.0), (0.8, 0.8, 0.8, 0.2), blur_p=0.5, solarize_p=0.5)
    view = augment.make_policy([spec], **changes).views[0]
    view.set_strength(strength)
    torch.manual_seed(0)
    crop, color, blur, solarize = view.operations
    area = crop.draw(4096, 100, 100)["box"][:, 2:].prod(1) / 1e4
    drawn, sigma = color.draw(4096, 16, 16), blur.draw(4096, 16, 16)["sigma"]
    shares = drawn["gray"].mean(), solarize.draw(4096, 16, 16)["solarized"].mean()
    return area.min(), drawn["factors"].min(0), drawn["factors"].max(0), sigma.max(), shares


def test_the_ranges_are_interpolated():
    area, low, high, sigma, (gray, solarized) = spreads(0.5)
    assert area == pytest.approx(0.55, abs=0.03)
    assert low == pytest.approx([0.6, 0.6, 0.6, -0.1], abs=0.01)
    assert high == pytest.approx([1.4, 1.4, 1.4, 0.1], abs=0.01)
    assert sigma == pytest.approx(1.05, abs=0.01)
    assert (gray, solarized) == pytest.approx((0.1, 0.25), abs=0.03)
    spec = ViewSpec(16, (0.1, 1.0), (0.8, 0.8, 0.8, 0.2), solarize_p=0.5).at_strength(0.5)
    assert spec.scale == pytest.approx((0.55, 1.0))
    assert spec.jitter == pytest.approx((0.4, 0.4, 0.4, 0.1))
    assert (spec.gray_p, spec.solarize_p) == pytest.approx((0.1, 0.25))


def test_automatic_augmentation_is_applied_to_that_share_of_the_images(photos):
    images = photos[:1, :, :32, :32].repeat(64, 1, 1, 1).float() / 255
    step = augment.simclr_views(16, auto="trivialaugment").views[0].pre_transform
    for strength in (0.0, 0.5):
        step.set_strength(strength)
        torch.manual_seed(0)
        changed = (step(images.clone()) != images).flatten(1).any(1).float().mean()
        assert changed <= (0.0 if strength == 0 else 0.7)
    assert changed > 0.2


def test_copies_keep_the_strength_and_do_not_share_it(photos):
    policy = augment.simclr_views(16)
    policy.set_strength(0.2)
    copied = copy.deepcopy(policy)
    policy.set_strength(1.0)
    assert copied.strength == 0.2
    weak = augment.simclr_views(16)
    weak.set_strength(0.2)
    assert torch.equal(views_of(copied, photos)[0], views_of(weak, photos)[0])


def test_the_schedule_is_its_formula():
    assert [StrengthSchedule(0.2, 0.8)(step, 10) for step in (0, 5, 10, 99)] == pytest.approx([0.2, 0.5, 0.8, 0.8])
    cosine = StrengthSchedule(1.0, 0.0, shape="cosine")
    expected = (1 + torch.tensor([0.0, 0.25, 0.5, 1.0]).mul(torch.pi).cos()) / 2
    torch.testing.assert_close(torch.tensor([cosine(step, 8) for step in (0, 2, 4, 8)]), expected, **f32(FORMULA))


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: augment.simclr_views(8).set_strength(1.5), ValueError, r"`strength` must lie in \[0, 1\], got 1.5"),
        (
            lambda: ViewPolicy([torch.nn.Identity()], size=8).set_strength(0.5),
            TypeError,
            "`views` must have a strength, got 'Identity'",
        ),
        (lambda: StrengthSchedule(-0.1), ValueError, "`start` must"),
        (lambda: StrengthSchedule(end=2.0), ValueError, "`end` must"),
        (lambda: StrengthSchedule(steps=0), ValueError, "`steps` must be >= 1"),
        (lambda: StrengthSchedule(epochs=1, steps=2), ValueError, "`steps` must be left out if `epochs` is given"),
        (lambda: StrengthSchedule(shape="step"), ValueError, "`shape` must be one of"),
    ],
)
def test_bad_input(act, error, message):
    with pytest.raises(error, match=message):
        act()
