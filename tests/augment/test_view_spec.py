"""What any view can have: erasing, noise, rotation, sizes that are not square, steps before the policy."""

import math

import kornia.augmentation as K
import pytest
import torch

from lightning_contrast import augment
from lightning_contrast.augment import ViewSpec, make_policy
from lightning_contrast.augment.fused import FusedDeform, FusedErase, FusedGaussianNoise, FusedResizedCrop
from lightning_contrast.augment.fused import view as view_module
from lightning_contrast.augment.fused.noise import normal_noise
from lightning_contrast.testing import HostSyncs
from tests.tolerances import FORMULA, NETWORK, f32

WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "jitter_p": 0.0, "gray_p": 0.0}  # no crop, no colors
ALL = {
    "size": (24, 40),
    "scale": (0.3, 1.0),
    "jitter": (0.4, 0.4, 0.2, 0.1),
    "blur_p": 0.5,
    "vertical_flip": 0.5,
    "rotation": 20.0,
    "rotation_p": 0.5,
    "noise_p": 0.5,
    "erase_p": 0.5,
}
NORMALIZED = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


@pytest.mark.parametrize("fused", [True, False])
def test_a_view_with_everything(emoji, fused):
    policy = make_policy([ViewSpec(**ALL)] * 2, fused=fused, **NORMALIZED)
    images = emoji[::100]
    before = images.clone()
    torch.manual_seed(0)
    views = policy(images)
    torch.manual_seed(0)
    again = policy(images)
    assert torch.equal(images, before)
    for view, same in zip(views, again, strict=True):
        assert view.shape == (len(images), 3, 24, 40)
        assert view.isfinite().all()
        assert torch.equal(view, same)
    assert not torch.equal(*views)
    with pytest.raises(ValueError, match="`locations` must be False"):
        make_policy([ViewSpec(**ALL)], locations=True)


def test_everything_is_the_same_in_blocks_jointly_and_one_by_one(photos, monkeypatch):
    images = photos.float() / 255
    views = {}
    for name, backend, limit in (
        ("blocks", "cpu", 1),
        ("joint", "accelerator", 1 << 30),
        ("single", "accelerator", 1),
    ):
        monkeypatch.setattr(view_module, "_JOINT_BYTES", limit)
        monkeypatch.setattr(view_module, "_BLOCK_BYTES", 1 << 12)
        torch.manual_seed(0)
        views[name] = make_policy([ViewSpec(**ALL)] * 3, backend=backend, **NORMALIZED)(images)
    for name in ("joint", "single"):
        for view, other in zip(views[name], views["blocks"], strict=True):
            torch.testing.assert_close(view, other, atol=1e-3, rtol=0)


def test_nothing_is_read_from_the_device():
    policy = make_policy([ViewSpec(**ALL)] * 2, **NORMALIZED)
    with HostSyncs() as syncs:
        for images in (torch.empty(8, 3, 50, 60), torch.empty(8, 3, 50, 60, dtype=torch.uint8)):
            views = [*policy(images.to("meta")), policy.eval_transform(images.to("meta"))]
            assert all(view.is_meta and view.shape == (8, 3, 24, 40) for view in views)
    assert not syncs.places


# erasing


@pytest.mark.parametrize("fused", [True, False])
def test_erased_boxes_become_zero_at_the_given_rate(fused):
    torch.manual_seed(0)
    spec = ViewSpec(32, **WHOLE, erase_p=0.3, erase_scale=(0.1, 0.2), erase_ratio=(0.5, 2.0))
    images = 0.9 + torch.rand(2000, 3, 32, 32) / 10
    (view,) = make_policy([spec], fused=fused, **NORMALIZED)(images)
    erased = (view.abs() < 1e-3).all(1)
    assert torch.equal((view.abs() < 1e-3).any(1), erased)  # each channel became its mean
    changed = erased.flatten(1).any(1)
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.03)
    height, width = (erased[changed].any(axis).sum(1) for axis in (2, 1))
    assert torch.equal(height * width, erased[changed].sum((1, 2)))  # one box
    share = (height * width).float() / 1024
    assert 0.08 < share.min() < 0.12
    assert 0.18 < share.max() < 0.23
    assert share.mean().item() == pytest.approx(0.15, abs=0.01)
    if fused:
        ratio = (height.float() / width).log2()
        assert ratio.abs().max() < 1.15
        assert ratio.mean().item() == pytest.approx(0, abs=0.1)


def test_boxes_that_do_not_fit_leave_the_image():
    images = torch.rand(50, 3, 6, 200)
    assert torch.equal(FusedErase(1.0, (1.0, 1.0), (1.0, 1.0))(images), images)


# noise


@pytest.mark.parametrize("fused", [True, False])
def test_noise_has_the_given_rate_and_width(fused):
    torch.manual_seed(0)
    spec = ViewSpec(16, **WHOLE, noise_p=0.4, noise_std=0.05)
    noise = make_policy([spec], fused=fused)(torch.full((1500, 3, 16, 16), 0.5))[0] - 0.5
    noisy = noise.abs().amax((1, 2, 3)) > 1e-3
    assert noisy.float().mean().item() == pytest.approx(0.4, abs=0.04)
    values = noise[noisy].flatten() / 0.05
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(1, abs=0.01)
    quantiles = torch.tensor([0.01, 0.25, 0.75, 0.99])
    expected = torch.special.ndtri(quantiles)
    torch.testing.assert_close(values.quantile(quantiles), expected, atol=0.03, rtol=0)
    assert make_policy([spec], fused=fused)(torch.ones(50, 3, 16, 16))[0].max() <= 1


def test_noise_of_images_and_pixels_is_independent():
    """Of random seeds, and of seeds that differ in their lowest or highest bits."""
    torch.manual_seed(0)
    counted = torch.arange(64)[:, None]
    random = torch.randint(-(2**31), 2**31, (64, 1), dtype=torch.int64)
    for seeds in (random, counted, counted * 2**25 - 2**31):
        noise = normal_noise(seeds.int(), (3, 32, 32)).flatten(1)
        between = torch.corrcoef(noise).fill_diagonal_(0)
        assert between.abs().max() < 5.5 / math.sqrt(noise.shape[1])
        for distance in (1, 32, 1024):
            product = (noise[:, :-distance] * noise[:, distance:]).mean()
            assert product.abs() < 4.5 / math.sqrt(noise.numel())
        assert noise.std().item() == pytest.approx(1, abs=0.01)
        assert (noise**4).mean().item() == pytest.approx(3, abs=0.1)


# rotation


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [33, (33, 49)])
def test_rotation_has_the_given_rate_and_range(size, fused):
    """Seen on a line through the center, which stays straight at any height and width."""
    torch.manual_seed(0)
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.zeros(600, 1, height, width)
    images[:, :, height // 2] = 1.0
    spec = ViewSpec(size, **WHOLE | {"ratio": (width / height,) * 2}, rotation=30.0, rotation_p=0.5)
    view = make_policy([spec], fused=fused, channels=1)(images)[0][:, 0]
    row = torch.arange(float(height))[:, None]
    left, right = width // 2 - 12, width // 2 + 12
    at = [(view[:, :, column] * row[:, 0]).sum(1) / view[:, :, column].sum(1) for column in (left, right)]
    angle = torch.atan2(at[1] - at[0], torch.tensor(24.0)).rad2deg()
    turned = angle.abs() > 0.5
    assert turned.float().mean().item() == pytest.approx(0.5 * 29.5 / 30, abs=0.06)
    quartiles = angle[turned].quantile(torch.tensor([0.05, 0.25, 0.75, 0.95]))
    torch.testing.assert_close(quartiles, torch.tensor([-27.0, -15.0, 15.0, 27.0]), atol=4.0, rtol=0)
    assert angle.abs().max() < 31


# sizes


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(20, 30), (90, 70)])
def test_crops_to_height_and_width_equal_interpolate(photos, shape, interpolation):
    images = photos.float() / 255
    for backend in ("cpu", "accelerator"):
        crop = FusedResizedCrop(shape, interpolation=interpolation, backend=backend)
        torch.manual_seed(0)
        views = crop(images)
        for image, view, box, flip in zip(images, views, crop._params["box"].int(), crop._params["flip"], strict=True):
            top, left, height, width = box.tolist()
            cut = image[None, :, top : top + height, left : left + width]
            mode = {"mode": "nearest-exact"} if interpolation == "nearest" else {"mode": interpolation}
            options = mode if interpolation == "nearest" else mode | {"antialias": True}
            expected = torch.nn.functional.interpolate(cut, shape, **options)[0].clamp(0, 1)
            torch.testing.assert_close(view, expected.flip(-1) if flip else expected, **f32(NETWORK))


@pytest.mark.parametrize("name", ["simclr_views", "byol_views", "dino_views", "mae_views", "moco_v2_views"])
@pytest.mark.parametrize("fused", [True, False])
def test_published_policies_take_height_and_width(name, fused):
    policy = getattr(augment, name)(size=(32, 64), fused=fused)
    images = torch.rand(2, 3, 50, 60)
    views = policy(images)
    assert views[0].shape == (2, 3, 32, 64)
    assert views[-1].shape[2:] == ((12, 28) if name == "dino_views" else (32, 64))
    assert policy.eval_transform(images).shape == (2, 3, 32, 64)
    assert policy.size == (32, 64)
    assert policy.input_spec["size"] == [32, 64]


def test_eval_transform_resizes_as_little_as_the_crop_allows():
    """Twice as wide as high, of images twice as high as wide: the middle quarter, resized."""
    images = torch.rand(2, 3, 80, 40)
    policy = make_policy([ViewSpec((10, 20), (0.5, 1.0))])
    expected = torch.nn.functional.interpolate(images, (40, 20), mode="bilinear", antialias=True)[:, :, 15:25]
    torch.testing.assert_close(policy.eval_transform(images), expected, **f32(FORMULA))
    square = make_policy([ViewSpec((16, 16), (0.5, 1.0))])
    assert (square.size, square.input_spec["size"]) == (16, 16)


# before the policy


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("step", [lambda images: 1 - images, K.RandomInvert(p=1.0)])
def test_a_step_before_the_policy_sees_pixels_in_0_to_1(emoji, step, fused):
    """A function or a module of Kornia, of uint8 and of float images, which stay as they are."""
    policy = make_policy([ViewSpec(32, **WHOLE)] * 2, fused=fused, pre_transform=step)
    for images in (emoji[:6], emoji[:6].float() / 255):
        before = images.clone()
        expected = 1 - (images if images.is_floating_point() else images.float() / 255)
        for view in policy(images):
            torch.testing.assert_close(view, expected, **f32(NETWORK))
        assert torch.equal(images, before)
        torch.testing.assert_close(policy.eval_transform(images), 1 - expected, **f32(FORMULA))


def test_a_step_is_drawn_for_each_view_and_follows_auto(emoji):
    calls = []

    def shift(images):
        calls.append(float(images.mean()))
        return images + torch.rand(len(images), 1, 1, 1) / 10

    torch.manual_seed(0)
    views = make_policy([ViewSpec(32, **WHOLE)] * 2, pre_transform=shift)(emoji[:4] // 2)
    assert len(calls) == 2
    assert calls[0] == calls[1]
    assert not torch.equal(*views)
    augment.simclr_views(16, auto="trivialaugment", pre_transform=shift)(emoji[:4])
    assert calls[2] != calls[3]  # of images that differ already


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ViewSpec((8,), (0.5, 1.0)), ValueError, r"`size` must be a whole number of pixels, or \(height"),
        (lambda: ViewSpec((8, 8.5), (0.5, 1.0)), ValueError, r"`size` must be a whole number of pixels, or \(height"),
        (lambda: ViewSpec((8, 0), (0.5, 1.0)), ValueError, "`size` must be >= 1"),
        (lambda: ViewSpec("8", (0.5, 1.0)), ValueError, "`size` must be a whole number"),
        (lambda: ViewSpec((8, 16), (0.5, 1.0), quarter_turns=True), ValueError, "`size` must be square with quarter"),
        (lambda: ViewSpec(8, (0.5, 1.0), rotation=200.0), ValueError, r"`rotation` must lie in \[0, 180\]"),
        (lambda: ViewSpec(8, (0.5, 1.0), rotation_p=2.0), ValueError, r"`rotation_p` must lie in \[0, 1\]"),
        (lambda: ViewSpec(8, (0.5, 1.0), noise_p=-1.0), ValueError, r"`noise_p` must lie in \[0, 1\]"),
        (lambda: ViewSpec(8, (0.5, 1.0), noise_std=-1.0), ValueError, "`noise_std` must be >= 0"),
        (lambda: ViewSpec(8, (0.5, 1.0), erase_p=1.5), ValueError, r"`erase_p` must lie in \[0, 1\]"),
        (lambda: ViewSpec(8, (0.5, 1.0), erase_scale=(0.5, 2)), ValueError, "`erase_scale` must be an ordered pair"),
        (lambda: ViewSpec(8, (0.5, 1.0), erase_ratio=(0, 2)), ValueError, "`erase_ratio` must start above 0"),
        (lambda: augment.dino_views(8, local_size=(4, 0)), ValueError, "`local_size` must be >= 1"),
        (lambda: FusedErase(fill=[0.5] * 2, p=1.0)(torch.rand(1, 3, 9, 9)), ValueError, "`fill` must have 3 numbers"),
        (lambda: FusedErase(scale=(0, 0.1)), ValueError, "`scale` must start above 0"),
        (lambda: FusedGaussianNoise(std=-1), ValueError, "`std` must be >= 0"),
        (lambda: augment.simclr_views(8, pre_transform=3), TypeError, "`pre_transform` must be callable"),
        (
            lambda: augment.simclr_views(8, pre_transform=lambda x: x[:1])(torch.rand(2, 3, 9, 9)),
            ValueError,
            "`pre_transform` must return as many float images",
        ),
        (
            lambda: augment.simclr_views(8, pre_transform=lambda x: x.mul(255).byte(), fused=False)(
                torch.rand(2, 3, 9, 9)
            ),
            ValueError,
            "`pre_transform` must return as many float images",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_deformation_without_square_images_keeps_them():
    images = torch.rand(3, 2, 12, 30)
    torch.testing.assert_close(FusedDeform(0.0, 0.0)(images), images, **f32(NETWORK))
