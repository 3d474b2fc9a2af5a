"""Every policy: published parameters, contract, random numbers, launches and freedom from host synchronization."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
from torchvision.transforms import v2

from benchmarks.common import count_launches
from lightning_contrast import augment
from lightning_contrast.augment import domains, kornia_view
from lightning_contrast.augment import two_view as policies
from lightning_contrast.augment.fused import view as view_module
from lightning_contrast.augment.images import check_policy_input
from lightning_contrast.augment.multi_crop import local_size_of
from lightning_contrast.testing import HostSyncs
from tests.tolerances import FORMULA, NETWORK, bound, f32

POLICIES = {name: getattr(augment, name) for name in augment.__all__ if name.endswith("_views")}
for of_clips in ("clip_views", "cpc_clip_views", "vjepa_views"):  # their input are clips: test_clips
    del POLICIES[of_clips]
DOMAINS = {name: getattr(domains, name) for name in domains.__all__ if name.endswith("_views")}
POLICIES |= DOMAINS
# Pixels in 0..255 or 0..1 here; Hounsfield units in its own tests, tests/augment/domains/test_medical.py.
POLICIES["ct_views"] = functools.partial(DOMAINS["ct_views"], scale=None)
CHANNELS = {
    "satellite_views": 13,
    "chest_xray_views": 1,
    "ct_views": 1,
    "mri_views": 1,
    "microscopy_views": 5,
}  # other than 3
MULTI_CROP = {"swav_views", "dino_views", "dinov2_views", "msn_views", "lejepa_views", "visreg_views"}
MASKED = {"data2vec_views", "mae_views", "simmim_views"}
ONE_VIEW = {"cpc_views", "gloria_views", "ijepa_views", "image_text_views"} | MASKED
NO_FLIP = ONE_VIEW - MASKED - {"cpc_views"} | {
    "chest_xray_views",
    "ct_views",
    "mri_views",
    "industrial_views",
    "document_views",
}
NO_BLUR = {"align_uniform_views", "simclr_cifar_views", "moco_v1_views", "supcon_views"}

# published parameters: crop, jitter and its p, gray, then blur and solarization of the first two views
TABLE = {
    "simclr_views": ((0.08, 1), (0.8, 0.8, 0.8, 0.2), 0.8, 0.2, (0.5, 0.5), (0, 0)),
    "simclr_cifar_views": ((0.08, 1), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, (0, 0), (0, 0)),
    "align_uniform_views": ((0.08, 1), (0.4, 0.4, 0.4, 0.4), 1.0, 0.2, (0, 0), (0, 0)),
    "moco_v1_views": ((0.2, 1), (0.4, 0.4, 0.4, 0.4), 1.0, 0.2, (0, 0), (0, 0)),
    "moco_v2_views": ((0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, (0.5, 0.5), (0, 0)),
    "moco_v3_views": ((0.2, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (1, 0.1), (0, 0.2)),
    "byol_views": ((0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (1, 0.1), (0, 0.2)),
    "barlow_twins_views": ((0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (1, 0.1), (0, 0.2)),
    "vicregl_views": ((0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (1, 0.1), (0, 0.2)),
    "vicreg_views": ((0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (1, 0.1), (0, 0.2)),
    "simsiam_views": ((0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, (0.5, 0.5), (0, 0)),
    "swav_views": ((0.14, 1), (0.8, 0.8, 0.8, 0.2), 0.8, 0.2, (0.5, 0.5), (0, 0)),
    "dino_views": ((0.4, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (1, 0.1), (0, 0.2)),
    "dinov2_views": ((0.32, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (1, 0.1), (0, 0.2)),
    "msn_views": ((0.3, 1), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, (0.5, 0.5), (0, 0)),
    "cpc_views": ((0.73, 1), (0.4, 0.4, 0.4, 0.2), 0.8, 0.25, (0,), (0,)),
    "gloria_views": ((0.7, 0.77), (0, 0, 0, 0), 0.0, 0.0, (0,), (0,)),
    "lejepa_views": ((0.3, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (0.5, 0.5), (0.2, 0.2)),
    "visreg_views": ((0.3, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (0.5, 0.5), (0.2, 0.2)),
    "wmse_views": ((0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.8, 0.1, (0, 0), (0, 0)),
    "mae_views": ((0.2, 1), (0, 0, 0, 0), 0.0, 0.0, (0,), (0,)),
    "simmim_views": ((0.67, 1), (0, 0, 0, 0), 0.0, 0.0, (0,), (0,)),
    "data2vec_views": ((0.08, 1), (0.4, 0.4, 0.4, 0), 1.0, 0.0, (0,), (0,)),
    "ijepa_views": ((0.3, 1), (0, 0, 0, 0), 0.0, 0.0, (0,), (0,)),
    "image_text_views": ((0.9, 1), (0, 0, 0, 0), 0.0, 0.0, (0,), (0,)),
    "supcon_views": ((0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, (0, 0), (0, 0)),
    "driving_views": ((0.4, 1), (0.4, 0.4, 0.4, 0.1), 0.8, 0.0, (0, 0), (0, 0)),
    "fine_grained_views": ((0.2, 1), (0.4, 0.4, 0.2, 0.05), 0.8, 0.0, (0, 0), (0, 0)),
    "document_views": ((0.6, 1), (0.2, 0.2, 0, 0), 0.8, 0.5, (0, 0), (0, 0)),
    "satellite_views": ((0.2, 1), (0.4, 0.4, 0, 0), 0.8, 0.2, (0.5, 0.5), (0, 0)),
    "chest_xray_views": ((0.3, 1), (0, 0, 0, 0), 0.0, 0.0, (0, 0), (0, 0)),
    "ct_views": ((0.3, 1), (0, 0, 0, 0), 0.0, 0.0, (0, 0), (0, 0)),
    "industrial_views": ((0.5, 1), (0.1, 0.1, 0.1, 0.1), 1.0, 0.0, (0, 0), (0, 0)),
    "microscopy_views": ((0.4, 1), (0, 0, 0, 0), 0.0, 0.0, (0, 0), (0, 0)),
    "mri_views": ((0.3, 1), (0, 0, 0, 0), 0.0, 0.0, (0, 0), (0, 0)),
    "histology_views": ((0.4, 1), (0.1, 0.1, 0, 0), 0.5, 0.0, (0.25, 0.25), (0, 0)),
}
LOCAL = {
    "swav_views": (6, (0.05, 0.14), 0.5),
    "dino_views": (8, (0.05, 0.4), 0.5),
    "dinov2_views": (8, (0.05, 0.32), 0.5),
    "msn_views": (10, (0.05, 0.3), 0.5),
    "lejepa_views": (6, (0.05, 0.3), 0.5),
    "visreg_views": (6, (0.05, 0.3), 0.5),
}
SIZES = {
    "simclr_cifar_views": 32,
    "supcon_views": 32,
    "align_uniform_views": 64,
    "cpc_views": 256,
    "industrial_views": 256,
    "simmim_views": 192,
}
GLOBAL = {"visreg_views": 4}
SECOND_CROP = {"fine_grained_views": (0.5, 1)}  # of the second view, where it is another
SOLARIZED = ("lejepa_views", "visreg_views")  # local views too


def operations(view):
    """Return the operations of a view by class name."""
    return {type(operation).__name__: operation for operation in view.operations}


def fitting(name, images):
    """Return RGB images (B, 3, H, W) with as many channels as the policy takes."""
    return images[:, torch.arange(CHANNELS.get(name, 3)) % 3]


def standardized(name):
    """Return a mean and a standard deviation for each channel of a policy's images."""
    return {"mean": [0.5] * CHANNELS.get(name, 3), "std": [0.2] * CHANNELS.get(name, 3)}


def test_table_covers_every_policy():
    assert TABLE.keys() == POLICIES.keys()
    assert LOCAL.keys() == MULTI_CROP


@pytest.mark.parametrize("name", POLICIES)
def test_numbers(name):
    crop, jitter, jitter_p, gray, blur, solarize = TABLE[name]
    views = POLICIES[name](size=224).views
    for i in range(1 if name in ONE_VIEW else 2):
        found = operations(views[i])
        color = found["FusedColorJitter"]
        assert found["FusedResizedCrop"].scale == (SECOND_CROP.get(name, crop) if i == 1 else crop)
        assert found["FusedResizedCrop"].size == 224
        assert found["FusedResizedCrop"].flip == (0 if name in NO_FLIP else 0.5)
        assert (color.brightness, color.contrast, color.saturation, color.hue) == pytest.approx(jitter)
        assert (color.probability, color.grayscale) == (jitter_p, gray)
        assert color.gray_first is (name == "moco_v1_views")
        assert color.additive_brightness is (name == "byol_views")
        assert getattr(found.get("FusedGaussianBlur"), "probability", 0) == blur[i]
        assert getattr(found.get("FusedSolarize"), "probability", 0) == solarize[i]
    bicubic = {"simclr", "simclr_cifar", "byol", "barlow_twins", "vicreg", "dino", "dinov2", "image_text", "gloria"}
    bicubic |= {"lejepa", "visreg", "wmse", "vicregl", "mae", "data2vec"}
    expected = "bicubic" if name.removesuffix("_views") in bicubic else "bilinear"
    assert operations(views[0])["FusedResizedCrop"].interpolation == expected
    if name in MULTI_CROP:
        count, scale, local_blur = LOCAL[name]
        large = GLOBAL.get(name, 2)
        assert len(views) == large + count
        for view in views[large:]:
            found = operations(view)
            assert (found["FusedResizedCrop"].size, found["FusedResizedCrop"].scale) == (96, scale)
            assert found["FusedGaussianBlur"].probability == local_blur
            assert ("FusedSolarize" in found) == (name in SOLARIZED)
    else:
        assert len(views) == (1 if name in ONE_VIEW else 2)


def test_special_numbers():
    assert operations(augment.simclr_views(224).views[0])["FusedGaussianBlur"].kernel_size == 23
    assert operations(augment.simclr_views(32).views[0])["FusedGaussianBlur"].kernel_size == 3
    assert operations(augment.byol_views(224).views[0])["FusedResizedCrop"].fit == "clamp"
    assert operations(augment.moco_v3_views(vit=True).views[0])["FusedResizedCrop"].scale == (0.08, 1.0)
    assert operations(augment.moco_v2_views().views[0])["FusedGaussianBlur"].kernel_size is None
    half = operations(augment.simclr_views(32, strength=0.5, blur=0.0).views[0])
    assert half["FusedColorJitter"].brightness == pytest.approx(0.4)
    assert "FusedGaussianBlur" not in half


def test_published_blur_of_dinov2():
    def blurs(policy):
        found = [operations(view).get("FusedGaussianBlur") for view in policy.views[:3]]
        return [getattr(blur, "probability", 0) for blur in found]

    assert blurs(augment.dinov2_views()) == [1.0, 0.1, 0.5]
    assert blurs(augment.dinov2_views(published_blur=True)) == [0, 0.9, 0.5]
    assert operations(augment.dinov2_views().views[0])["FusedGaussianBlur"].kernel_size == 9


def test_local_sizes():
    assert [local_size_of(size, None) for size in (224, 160, 112, 96, 64, 32, 8, 2)] == [96, 68, 48, 40, 28, 12, 4, 2]
    assert operations(augment.dinov2_views(local_size=98).views[-1])["FusedResizedCrop"].size == 98


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", POLICIES)
def test_views_of_every_policy(emoji, name, fused):
    options = {} if fused or name != "vicregl_views" else {"locations": False}
    policy = POLICIES[name](size=24, fused=fused, **options)
    images = fitting(name, emoji[::200])
    before = images.clone()
    torch.manual_seed(0)
    views = policy(images)
    assert torch.equal(images, before)
    large = 1 if name in ONE_VIEW else GLOBAL.get(name, 2)
    channels = images.shape[1]
    local = [(len(images), channels, 12, 12)] * (len(views) - large)
    assert [tuple(view.shape) for view in views] == [(len(images), channels, 24, 24)] * large + local
    for view in views:
        assert view.dtype == torch.float32
        assert view.is_contiguous()
        assert view.min() >= -bound(FORMULA)  # blurs sum to 1 up to rounding
        assert view.max() <= 1 + bound(FORMULA)
    difference = (views[0] - (policy(images)[0] if name in ONE_VIEW else views[1])).abs().mean((1, 2, 3))
    different = difference > 1e-3
    # Most crops of 0.9..1 of a square at another aspect ratio do not fit: the whole image is taken, also twice.
    # All of a white crop is above the window of soft tissue.
    some = ("gloria_views", "image_text_views", "ct_views")
    assert different.any() if name in some else different.all()


@pytest.mark.parametrize("name", POLICIES)
def test_both_backends_agree(photos, name):
    """The same draw in blocks and in batched kernels; float only, as the blocks resample uint8 in 8 bits."""
    images = fitting(name, photos.float() / 255)
    views = {}
    for backend in ("cpu", "accelerator"):
        torch.manual_seed(0)
        views[backend] = POLICIES[name](size=70, backend=backend)(images)
    for a, b in zip(views["cpu"], views["accelerator"], strict=True):
        different = (a - b).abs() > 1e-4  # values at the threshold of the solarization may fall on either side
        assert different.float().mean() < 1e-3


@pytest.mark.parametrize("name", POLICIES)
def test_no_host_synchronization(emoji, name):
    policy = POLICIES[name](size=32, backend="accelerator", **standardized(name))
    images = fitting(name, emoji[:16])
    policy(images)
    with HostSyncs() as syncs:
        policy(images)
        policy(images / 255)
        policy.eval_transform(images)
    # Parameters are drawn on the host anyway, those of Kornia's operations by Kornia; the next test separates the two.
    own = [place for place in syncs.places if not place.endswith("in uniform: numpy")]
    assert all("kornia" in place for place in own)


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_read_from_the_device(name):
    """The meta device has no values: reading one is an error, and so is mixing in a tensor on the host."""
    policy = POLICIES[name](size=64, **standardized(name))
    shape = (8, CHANNELS.get(name, 3), 80, 90)
    with HostSyncs() as syncs:
        for images in (torch.empty(shape, dtype=torch.uint8), torch.empty(shape)):
            views = policy(images.to("meta"))
            assert all(view.is_meta for view in views)
            assert policy.eval_transform(images.to("meta")).is_meta
    assert not syncs.places


@pytest.mark.parametrize(
    ("name", "edge", "size", "most"),
    [
        ("simclr_views", 32, 32, 200),
        ("simclr_views", 80, 64, 200),
        ("moco_v3_views", 32, 32, 400),
        ("dino_views", 32, 32, 600),
    ],
)
def test_launches_of_an_accelerator(name, edge, size, most):
    """Equal views are computed together, so that DINO's ten views take three rounds of kernels."""
    policy = POLICIES[name](size=size, backend="accelerator")
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, edge, edge), dtype=torch.uint8)
    for batch in (images, images / 255):
        assert 50 < count_launches(lambda batch=batch: policy(batch)) <= most


@pytest.mark.parametrize("limit", [1, 1 << 18, 1 << 30])
@pytest.mark.parametrize("name", POLICIES)
def test_joint_views_equal_single_ones(emoji, name, limit, monkeypatch):
    """The same draws, whether all views are computed together, in parts or one by one."""
    monkeypatch.setattr(view_module, "_JOINT_BYTES", limit)
    policy = POLICIES[name](size=24, backend="accelerator", **standardized(name))
    images = fitting(name, emoji[::150])
    torch.manual_seed(0)
    views = policy(images)
    torch.manual_seed(0)
    scaled = check_policy_input(images, policy.channels, policy.scale)
    for view, module in zip(views, policy.views, strict=True):
        different = (view - module(scaled)).abs() > 1e-5  # 2e-6 of a pixel in 0..1
        assert different.float().mean() < 1e-3  # at the threshold of the solarization a rounding inverts a pixel


@pytest.mark.parametrize("backend", ["cpu", "accelerator"])
@pytest.mark.parametrize("name", POLICIES)
def test_random_numbers_come_from_the_global_generator(emoji, name, backend):
    policy = POLICIES[name](size=16, backend=backend)
    images = fitting(name, emoji[:4])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        first = policy(images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    second = policy(images)
    third = policy(images)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))


@pytest.mark.slow
def test_flip_crop_and_grayscale_rates():
    """Measured on the views: flips and crops on a ramp, grayscale on the channels."""
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 32).expand(2000, 3, 32, 32)
    (view, _) = augment.simclr_views(32, strength=0.0, blur=0.0)(ramp)
    row = view[:, 0, 16]
    assert (row[:, 0] > row[:, -1]).float().mean().item() == pytest.approx(0.5, abs=0.03)
    reference = v2.RandomResizedCrop(32, interpolation=v2.InterpolationMode.BICUBIC)
    expected = torch.stack([reference(image) for image in ramp[:400]])[:, 0, 16]
    widths = [(rows.amax(1) - rows.amin(1)).quantile(torch.tensor([0.1, 0.5, 0.9])) for rows in (row, expected)]
    torch.testing.assert_close(*widths, atol=0.05, rtol=0)
    colorful = torch.rand(2000, 3, 1, 1).expand(-1, -1, 32, 32)
    gray = [view.std(1).amax((1, 2)) < 1e-4 for view in augment.simclr_cifar_views()(colorful)]
    assert torch.cat(gray).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (gray[0] != gray[1]).any()


def test_images_of_a_batch_differ(emoji):
    """Every image has its own random numbers: copies of one image give different views."""
    torch.manual_seed(0)
    for view in augment.simclr_views(32)(emoji[5:6].expand(16, -1, -1, -1)):
        distances = torch.cdist(view.flatten(1), view.flatten(1))
        assert (distances[~torch.eye(16, dtype=torch.bool)] > 0.1).all()


def test_order_of_the_batch_is_kept(emoji):
    """The operations sort the batch internally: view i must still belong to image i."""
    images = torch.arange(300).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 300
    for backend in ("cpu", "accelerator"):
        (view, _) = augment.simclr_views(8, strength=0.0, blur=0.0, backend=backend)(images)
        torch.testing.assert_close(view, images.contiguous(), **f32(FORMULA))
        (view, _) = augment.simclr_views(200, strength=0.01, blur=1.0, backend=backend)(images[::50])
        torch.testing.assert_close(view.mean((1, 2, 3)), images[::50, 0, 0, 0], atol=0.02, rtol=0)


def test_eval_transform(emoji):
    policy = augment.simclr_views(32)
    assert torch.equal(policy.eval_transform(emoji[:4]), emoji[:4].float() / 255)
    floats = emoji[:4] / 255
    plain = policy.eval_transform(floats)
    assert torch.equal(plain, floats)
    assert plain.data_ptr() != floats.data_ptr()
    wide = torch.rand(2, 3, 40, 60)
    expected = torch.nn.functional.interpolate(wide, (32, 48), mode="bicubic", antialias=True).clamp(0, 1)[..., 8:40]
    torch.testing.assert_close(policy.eval_transform(wide), expected)
    assert policy.eval_transform(torch.rand(1, 3, 10, 17)).shape == (1, 3, 32, 32)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    plain = augment.simclr_views(32, mean=mean, std=std).eval_transform(floats)
    torch.testing.assert_close(plain[:, 1], (floats[:, 1] - 0.2) / 0.6)


def test_normalization_is_the_last_step(emoji):
    torch.manual_seed(0)
    raw = augment.moco_v3_views(24)(emoji[:8])
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    for backend in ("cpu", "accelerator"):
        torch.manual_seed(0)
        views = augment.moco_v3_views(24, mean=mean.tolist(), std=std.tolist(), backend=backend)(emoji[:8])
        for view, other in zip(views, raw, strict=True):
            torch.testing.assert_close(view, (other - mean.view(3, 1, 1)) / std.view(3, 1, 1), **f32(NETWORK))


def test_input_spec():
    policy = augment.dino_views(32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    expected = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    assert policy.input_spec == expected | {"interpolation": "bicubic"}
    assert augment.moco_v2_views(32, mean=policy.mean, std=policy.std).input_spec == expected  # torchvision's default
    assert (policy.size, policy.mean, policy.std) == (32, [0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    plain = {"size": 8, "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bicubic"}
    assert augment.simclr_views(8).input_spec == plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_dtypes(emoji, dtype):
    images = (emoji[:6] / 255).to(dtype)
    for backend in ("cpu", "accelerator"):
        views = augment.moco_v3_views(40, backend=backend)(images)
        assert [view.dtype for view in views] == [torch.float32] * 2
    assert augment.simclr_views(40).eval_transform(images).dtype == torch.float32


def test_autocast_changes_nothing(emoji):
    policy = augment.simclr_views(32)
    torch.manual_seed(0)
    views = policy(emoji[:8])
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = policy(emoji[:8])
        plain = policy.eval_transform(emoji[:8])
    assert all(torch.equal(a, b) for a, b in zip(views, mixed, strict=True))
    assert plain.dtype == torch.float32


@pytest.mark.parametrize("auto", ["randaugment", "autoaugment", "trivialaugment"])
@pytest.mark.parametrize("fused", [True, False])
def test_automatic_augmentation(emoji, auto, fused):
    policy = augment.simclr_cifar_views(24, auto=auto, fused=fused)
    torch.manual_seed(0)
    views = policy(emoji[:12])
    torch.manual_seed(0)
    again = policy(emoji[:12])
    torch.manual_seed(0)
    without = augment.simclr_cifar_views(24, fused=fused)(emoji[:12])
    for view, same, other in zip(views, again, without, strict=True):
        assert torch.equal(view, same)
        assert not torch.equal(view, other)
        assert -bound(FORMULA) <= view.min() <= view.max() <= 1 + bound(FORMULA)


@pytest.mark.parametrize(
    ("auto", "reference"),
    [
        ("randaugment", v2.RandAugment(2, 9)),
        ("autoaugment", v2.AutoAugment()),
        ("trivialaugment", v2.TrivialAugmentWide()),
    ],
)
def test_automatic_augmentation_is_drawn_for_each_image(photos, auto, reference):
    image = photos[0]
    torch.manual_seed(0)
    ours = kornia_view.auto_augment(auto)(image[None].float().div(255).expand(64, -1, -1, -1).contiguous())
    theirs = torch.stack([reference(image) for _ in range(64)])
    distinct = [len(torch.unique(batch.flatten(1), dim=0)) for batch in (ours.mul(255).round(), theirs)]
    assert distinct[0] > 0.6 * distinct[1]
    assert ours.shape == (64, *image.shape)


class Add(torch.nn.Module):
    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def forward(self, images):
        return images + self.amount


def test_operations_per_image_keep_the_order_of_the_batch():
    torch.manual_seed(0)
    images = torch.arange(300.0).mul(1000)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    added = kornia_view.PerImage([Add(1), Add(10), Add(100)], count=2)(images) - images
    assert added.amin((1, 2, 3)).equal(added.amax((1, 2, 3)))
    amounts, counts = added[:, 0, 0, 0].unique(return_counts=True)
    assert amounts.tolist() == [2, 11, 20, 101, 110, 200]  # with replacement, as in the paper
    assert counts.div(300).tolist() == pytest.approx([1 / 9, 2 / 9, 1 / 9, 2 / 9, 2 / 9, 1 / 9], abs=0.08)


@pytest.mark.parametrize("channels", [1, 2, 13])
def test_other_numbers_of_channels(channels):
    images = torch.rand(6, channels, 20, 20)
    color = channels == 1
    for fused in (True, False):
        policy = augment.byol_views(16, channels=channels, color=color, fused=fused and channels != 1)
        assert [view.shape for view in policy(images)] == [(6, channels, 16, 16)] * 2
        assert policy.eval_transform(images).shape == (6, channels, 16, 16)


def test_policies_can_be_copied(emoji):
    policy = augment.dino_views(16)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        torch.manual_seed(0)
        views = policy(emoji[:3])
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(views, other(emoji[:3]), strict=True))
    assert policy.state_dict() == {}


@pytest.mark.parametrize("size", [1, 5, 33])
def test_one_image_any_size(emoji, size):
    for policy in (augment.simclr_views(size), augment.moco_v3_views(size), augment.dino_views(size)):
        assert policy(emoji[:1])[0].shape == (1, 3, size, size)


@pytest.mark.parametrize("name", POLICIES)
def test_everything_but_the_size_is_given_by_keyword(name):
    parameters = list(inspect.signature(POLICIES[name]).parameters.values())
    assert [p.name for p in parameters[:3]] == ["size", "mean", "std"]
    assert [p.default for p in parameters[1:3]] == [None, None]
    assert {p.kind for p in parameters[1:-1]} == {inspect.Parameter.KEYWORD_ONLY}
    assert (parameters[-1].name, parameters[0].default) == (
        "options",
        SIZES.get(name, 224),
    )
    with pytest.raises(TypeError, match="positional argument"):
        POLICIES[name](8, [0.5] * 3, [0.5] * 3)


def test_specs_are_the_only_positional_argument_of_make_policy():
    spec = augment.ViewSpec(8, (0.5, 1.0))
    with pytest.raises(TypeError, match="positional argument"):
        augment.make_policy([spec], [0.5] * 3, [0.5] * 3)
    assert augment.make_policy([spec], mean=[0.5] * 3, std=[0.25] * 3).std == [0.25] * 3
    assert augment.make_policy([spec]).mean == [0.0] * 3


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize("name", POLICIES)
def test_bad_size(name, size):
    with pytest.raises(ValueError, match="`size` must be >= 1"):
        POLICIES[name](size=size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: augment.simclr_views(32, strength=-1), "`strength` must be >= 0"),
        (lambda: augment.simclr_views(32, strength=3), r"`hue` must lie in \[0, 0.5\]"),
        (lambda: augment.simclr_views(32, blur=1.5), "`blur` must lie in"),
        (lambda: augment.simclr_views(32, fused=False, strength=3), r"`hue` must lie in \[0, 0.5\]"),
        (lambda: augment.simclr_views(32, mean=[0.5] * 3), "`mean` must be given together with `std`"),
        (lambda: augment.simclr_views(32, mean=[0.5], std=[0.5]), "`mean` must have one number per channel"),
        (lambda: augment.simclr_views(32, mean=[0.5] * 3, std=[0.0] * 3), "`std` must be above 0"),
        (lambda: augment.simclr_views(32, channels=4), r"`channels` must be 3 .* got 4\. Set `color=False`"),
        (lambda: augment.simclr_views(32, channels=0), "`channels` must be >= 1"),
        (lambda: augment.simclr_views(32, auto="rand"), "Did you mean 'randaugment'|`auto` must be one of"),
        (lambda: augment.simclr_views(32, auto="randaugment", channels=1), "`auto` must be None"),
        (lambda: augment.simclr_views(32, backend="gpu"), "`backend` must be one of"),
        (lambda: augment.dino_views(global_scale=(1.0, 0.4)), "`scale` must be an ordered pair"),
        (lambda: augment.dino_views(fused=False, global_scale=(1.0, 0.4)), "`scale` must be an ordered pair"),
        (lambda: augment.dino_views(local_views=-1), "`local_views` must be >= 0"),
        (lambda: augment.dino_views(local_size=0), "`local_size` must be >= 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_option():
    with pytest.raises(TypeError, match="fusd"):
        augment.simclr_views(32, fusd=True)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, r"`images` must be uint8 .* got 'torch.int64'\. "),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int16), TypeError, "uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.bool), TypeError, "uint8"),
        (torch.zeros(3, 8, 8), ValueError, r"`images` must have the shape \(B, C, H, W\), got \(3, 8, 8\)\. "),
        (torch.zeros(2, 1, 8, 8), ValueError, "have 3 channels.*channels=1"),
        (torch.zeros(0, 3, 8, 8), ValueError, "hold at least one image"),
        ([torch.zeros(3, 8, 8)], TypeError, "`images` must be a tensor"),
    ],
)
def test_bad_images(images, error, message, fused):
    policy = augment.simclr_views(8, fused=fused)
    for call in (policy, policy.eval_transform):
        with pytest.raises(error, match=message):
            call(images)


def test_every_docstring_names_its_source():
    for name, policy in (POLICIES | DOMAINS).items():
        assert "https://arxiv.org/abs/" in policy.__doc__ or "https://doi.org/" in policy.__doc__, name
    assert policies.__doc__
