"""Bands, index channels and other ranges of pixels: distributions, values, both forms, bad inputs."""

import pytest
import torch
from lightning import Trainer

import lightning_contrast as lc
from lightning_contrast import augment
from lightning_contrast.augment.domains import histology_views, satellite_views
from lightning_contrast.augment.fused import FusedBandDropout, FusedBandSwap, FusedColorJitter
from lightning_contrast.data import GroupPairs
from lightning_contrast.testing import HostSyncs
from tests.tolerances import CONVERGED, FORMULA, NETWORK, f32


def constant_bands(count: int, channels: int):
    """Images whose band c has the value (c + 1) / 20 everywhere, (count, channels, 6, 6)."""
    values = (torch.arange(channels) + 1) / 20
    return values.view(1, -1, 1, 1).expand(count, -1, 6, 6).contiguous()


def test_dropout_has_the_given_rate_and_numbers_of_bands():
    torch.manual_seed(0)
    fill = [0.9 + band / 1000 for band in range(13)]
    images = constant_bands(6000, 13)
    views = FusedBandDropout(13, 0.4, most=6, fill=fill)(images)
    dropped = views != images
    assert torch.equal(views[dropped], torch.tensor(fill).view(1, -1, 1, 1).expand_as(views)[dropped])
    assert torch.equal(dropped.all((2, 3)), dropped.any((2, 3)))  # whole bands
    counts = dropped[:, :, 0, 0].sum(1)
    rates = torch.bincount(counts, minlength=7).float() / 6000
    torch.testing.assert_close(rates, torch.tensor([0.6] + [0.4 / 6] * 6), atol=0.02, rtol=0)
    each = dropped[:, :, 0, 0].float().mean(0)
    torch.testing.assert_close(each, torch.full((13,), 0.4 * 3.5 / 13), atol=0.02, rtol=0)


@pytest.mark.parametrize(("channels", "keep", "most"), [(4, 3, 1), (5, 3, 2), (2, 1, 1)])
def test_dropout_keeps_enough_bands(channels, keep, most):
    torch.manual_seed(0)
    images = constant_bands(300, channels)
    counts = (FusedBandDropout(channels, 1.0, most=6, keep=keep)(images) != images)[:, :, 0, 0].sum(1)
    assert counts.unique().tolist() == list(range(1, most + 1))


def test_swap_exchanges_two_bands_of_the_first():
    torch.manual_seed(0)
    images = constant_bands(3000, 5)
    views = FusedBandSwap(4, 0.3)(images)
    moved = (views != images)[:, :, 0, 0]
    assert set(moved.sum(1).unique().tolist()) == {0, 2}
    assert moved.any(1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert not moved[:, 4].any()
    assert torch.equal(views.sort(1).values, images)
    torch.testing.assert_close(moved[:, :4].float().mean(0), torch.full((4,), 0.15), atol=0.03, rtol=0)


def test_index_channels():
    images = torch.rand(2, 4, 3, 3)
    images[0, :2] = 0
    found = augment.append_indices(images, [(0, 1), (3, 2)])
    assert torch.equal(found[:, :4], images)
    assert torch.equal(found[0, 4], torch.full((3, 3), 0.5))
    first, second = images[:, 3], images[:, 2]
    torch.testing.assert_close(2 * found[:, 5] - 1, (first - second) / (first + second), **f32(FORMULA))
    torch.testing.assert_close(augment.append_indices(images / 2, [(3, 2)])[:, 4], found[:, 5], **f32(FORMULA))


def test_gray_of_bands_is_their_mean():
    images = torch.rand(3, 5, 4, 4)
    gray = FusedColorJitter(grayscale=1.0, band_gray=True)(images)
    torch.testing.assert_close(gray, images.mean(1, keepdim=True).expand_as(images), **f32(FORMULA))
    with pytest.raises(ValueError, match="have 3 channels for saturation"):
        FusedColorJitter(grayscale=1.0)(images)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_any_number_of_bands(channels, fused):
    torch.manual_seed(0)
    indices = [(1, 0)] if channels > 1 else []
    total = channels + len(indices)
    options = {"drop": 1.0} if total > 3 else {}
    options |= {"swap": 0.5} if channels > 1 else {}
    mean, std = [0.25 + band / 100 for band in range(total)], [0.5] * total
    policy = satellite_views(12, mean=mean, std=std, channels=channels, indices=indices, fused=fused, **options)
    images = torch.rand(9, channels, 20, 16)
    for view in policy(images):
        assert view.shape == (9, total, 12, 12)
        assert view.isfinite().all()
        empty = view.abs().amax((2, 3)) < CONVERGED  # dropped: the mean
        assert empty.any(1).all() == (total > 3)
        assert (~empty).sum(1).min() >= min(3, total)
    plain = policy.eval_transform(images)
    assert plain.shape == (9, total, 12, 12)
    pixels = plain * 0.5 + torch.tensor(mean).view(1, -1, 1, 1)
    torch.testing.assert_close(pixels, augment.append_indices(pixels[:, :channels], indices), **f32(FORMULA))
    assert len(policy.mean) == total


def test_bands_are_drawn_without_host_reads():
    policy = satellite_views(16, indices=[(7, 3)], drop=1.0, swap=1.0, scale=(0, 10_000))
    images = torch.empty(8, 13, 20, 24, dtype=torch.int16, device="meta")
    with HostSyncs() as syncs:
        views = [*policy(images), policy.eval_transform(images)]
    assert all(view.is_meta and view.shape == (8, 14, 16, 16) for view in views)
    assert not syncs.places


@pytest.mark.parametrize("fused", [True, False])
def test_clouds_are_white_in_every_band_at_the_given_rate(fused):
    torch.manual_seed(0)
    images = torch.full((500, 13, 16, 16), 0.2)
    policy = satellite_views(16, clouds=0.4, fused=fused)
    for view in policy(images):
        spread = view.amax((2, 3)) - view.amin((2, 3))
        clouded = (spread > 0.05).all(1)
        assert torch.equal(clouded, (spread > 0.05).any(1))
        assert clouded.float().mean().item() == pytest.approx(0.4, abs=0.08)
    assert not any((view.std((1, 2, 3)) > 1e-3).any() for view in satellite_views(16, fused=fused)(images))


@pytest.mark.filterwarnings("ignore::UserWarning")  # workers, log interval
def test_two_dates_of_a_place_are_a_pair_with_a_draw_each(tmp_path):
    """The pairs come from the data, here of dates 4 and more apart in brightness; each date has a view of its own."""
    places, dates = 12, 2
    brightness = 0.2 + 0.4 * torch.arange(dates).repeat(places)
    bands = brightness.view(-1, 1, 1, 1).expand(-1, 4, 12, 12).clone()
    data = torch.utils.data.TensorDataset(bands, torch.zeros(places * dates, dtype=torch.int64))
    pairs = GroupPairs(
        data, key=torch.arange(places).repeat_interleave(dates), role=torch.arange(dates).repeat(places), batch_size=6
    )
    seen = []

    class Method(lc.SimCLR):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 64, 8))
    net.num_features = 8
    views = lc.ViewAugmentation(satellite_views(8, channels=4, clouds=0.5), seed=0)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[views],
    )
    trainer.fit(Method(net), pairs)
    earlier, later = (torch.cat([batch[place] for batch in seen]) for place in (0, 1))
    assert earlier.shape == later.shape == (12, 4, 8, 8)
    assert earlier.mean() < later.mean()
    assert len(earlier.flatten(1).unique(dim=0)) == 12  # images of one brightness: a draw for each of them


@pytest.mark.parametrize("backend", ["cpu", "accelerator"])
def test_bands_follow_the_seed_and_both_backends_agree(backend):
    images = torch.rand(6, 13, 24, 24)
    views = []
    for form in ("cpu", backend):
        torch.manual_seed(5)
        views.append(satellite_views(16, indices=[(7, 3)], drop=0.5, swap=0.5, backend=form)(images))
    for first, second in zip(*views, strict=True):
        torch.testing.assert_close(first, second, **f32(NETWORK))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.int16, (0, 10_000)),
        (torch.uint16, (0, 65_535)),
        (torch.int32, (-1024, 3071)),
        (torch.float32, (-25.0, 0.0)),
        (torch.uint8, (10, 200)),
    ],
)
def test_scale_maps_its_range_to_one(dtype, scale):
    """The views of scaled integers are those of the same image in 0..1; values outside the range are clipped."""
    torch.manual_seed(0)
    low, high = scale
    stored = torch.linspace(low - 5 if low >= 10 or low < 0 else 0, min(high + 5, 65_535), 3 * 400).view(1, 3, 20, 20)
    stored = (stored if dtype == torch.float32 else stored.round().int()).to(dtype)
    expected = ((stored.double() - low) / (high - low)).clamp(0, 1).float()
    for fused in (True, False):
        given, plain = (satellite_views(20, channels=3, fused=fused, scale=s) for s in (scale, None))
        torch.testing.assert_close(given.eval_transform(stored), expected, **f32(FORMULA))
        torch.manual_seed(1)
        views = given(stored)
        torch.manual_seed(1)
        for view, same in zip(views, plain(expected), strict=True):
            torch.testing.assert_close(view, same, **f32(NETWORK))


def test_whole_images_are_scaled_once():
    pixels = torch.randint(10, 200, (2, 3, 16, 16), dtype=torch.uint8)
    whole = augment.WholeImages(pixels, torch.tensor([[16, 16], [16, 16]]).numpy())
    policy = histology_views(16, scale=(10, 200))
    torch.testing.assert_close(policy.eval_transform(whole), policy.eval_transform(pixels), **f32(FORMULA))


@pytest.mark.filterwarnings("ignore::UserWarning")  # workers, log interval
def test_sixteen_bits_reach_the_policy_in_a_run(tmp_path):
    """ViewAugmentation leaves the check of the range to a policy that has one."""
    bands = torch.randint(0, 10_000, (8, 4, 12, 12), dtype=torch.int16)
    seen = []

    class Policy(augment.ViewPolicy):
        def forward(self, images):
            seen.append(images.dtype)
            return super().forward(images)

    made = satellite_views(8, channels=4, scale=(0, 10_000))
    policy = Policy(list(made.views), size=8, channels=4, scale=(0, 10_000))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 64, 8))
    net.num_features = 8
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        num_sanity_val_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[lc.ViewAugmentation(policy, seed=0)],
    )
    loader = torch.utils.data.DataLoader(bands, batch_size=8)
    trainer.fit(lc.SimCLR(net), loader, loader)
    assert trainer.global_step == 1
    assert seen == [torch.int16]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.uint8, (0, 10_000)), (torch.int16, (0, 65_535)), (torch.uint16, (-1024, 3071)), (torch.uint8, (-1, 1))],
)
def test_a_scale_that_the_type_cannot_hold_is_another_one(dtype, scale):
    """Bytes would be nearly black, and 16-bit images read as signed ones negative where they are bright."""
    policy = satellite_views(8, channels=3, scale=scale)
    for call in (policy, policy.eval_transform):
        with pytest.raises(ValueError, match=f"`scale` must lie in the range of the images, which are {dtype}"):
            call(torch.zeros(1, 3, 8, 8, dtype=dtype))
    assert policy(torch.zeros(1, 3, 8, 8))[0].shape == (1, 3, 8, 8)


@pytest.mark.filterwarnings("ignore::UserWarning")  # workers, log interval
@pytest.mark.parametrize(
    ("images", "scale", "error", "message"),
    [
        (torch.rand(4, 4, 9, 9) * 5000, None, ValueError, "lie in 0..1 where they are float.*`scale`"),
        (torch.ones(4, 4, 9, 9, dtype=torch.int16), None, TypeError, "uint8 in 0..255 or float in 0..1.*`scale`"),
        (torch.rand(4, 4, 9, 9), (0, 10_000), ValueError, r"use the range of `scale`, \(0, 10000\).*`scale=None`"),
        (torch.full((4, 4, 9, 9), torch.nan), (0, 10_000), ValueError, "be finite, got 'NaN'"),
        (torch.rand(4, 5, 9, 9) * 5000, (0, 10_000), ValueError, "have 4 channels.*channels=5"),
        (torch.zeros(4, 4, 9, 9), (0, 10_000), None, ""),
        (torch.rand(4, 4, 9, 9), (0.0, 0.5), None, ""),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_run_refuses_values_of_another_range(images, scale, error, message, stage, tmp_path):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 64, 8))
    net.num_features = 8
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[lc.ViewAugmentation(satellite_views(8, channels=4, scale=scale), seed=0)],
    )
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    if error is None:
        getattr(trainer, stage)(lc.SimCLR(net), loader)
        return
    with pytest.raises(error, match=message):
        getattr(trainer, stage)(lc.SimCLR(net), loader)


@pytest.mark.parametrize("make", [lambda: satellite_views(8, channels=3), lambda: histology_views(8)])
def test_sixteen_bits_need_a_scale(make):
    for call in (make(), make().eval_transform):
        with pytest.raises(TypeError, match=r"without `scale`, got 'torch.int16'.*scale=\(low, high\)"):
            call(torch.zeros(1, 3, 8, 8, dtype=torch.int16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: satellite_views(8)(torch.rand(1, 12, 8, 8)), "have 13 channels.*channels=12"),
        (lambda: satellite_views(8, indices=[(13, 0)]), "`indices` must hold pairs of two of the 13 bands"),
        (lambda: satellite_views(8, indices=[(2, 2)]), "`indices` must hold pairs of two of the 13 bands"),
        (lambda: satellite_views(8, indices=[(7, 3)], mean=[0.5] * 13, std=[1.0] * 13), "one number per channel"),
        (lambda: satellite_views(8, channels=3, drop=0.5), "`channels` must be >= 4"),
        (lambda: satellite_views(8, channels=1, swap=0.5), "`channels` must be >= 2"),
        (lambda: satellite_views(8, drop=1.5), r"`drop` must lie in \[0, 1\]"),
        (lambda: satellite_views(8, swap=-0.5), r"`swap` must lie in \[0, 1\]"),
        (lambda: satellite_views(8, clouds=1.5), r"`clouds` must lie in \[0, 1\]"),
        (lambda: satellite_views(8, channels=0), "`channels` must be >= 1"),
        (lambda: satellite_views(8, color=True), "`channels` must be 3 .* for the color operations"),
        (lambda: satellite_views(8, scale=(1, 0)), "`scale` must be a pair"),
        (lambda: satellite_views(8, scale=(5, 5)), "`scale` must be a pair"),
        (lambda: satellite_views(8, scale=65_535), "`scale` must be a pair"),
        (lambda: FusedBandDropout(5, fill=[0.0]), "`fill` must have one number per band"),
        (lambda: FusedBandDropout(5)(torch.rand(1, 4, 2, 2)), "have 5 bands"),
        (lambda: FusedBandSwap(5)(torch.rand(1, 4, 2, 2)), "have 5 bands"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
