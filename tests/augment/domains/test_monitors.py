"""What watches a run, on images of one, four and thirteen channels, on the scale of their domain."""

import warnings

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image

import lightning_contrast as lc
from lightning_contrast.augment.domains import chest_xray_views, ct_views, microscopy_views, satellite_views

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # workers, log interval


def run(tmp_path, policy, images, **options):
    """Train one epoch on images (N, C, H, W) and return the monitor, the picture of the views and the warnings."""
    torch.manual_seed(0)
    channels = policy.channels + len(policy.indices)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 4, 3), torch.nn.Tanh(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()
    )
    net.num_features = 16
    monitor = lc.InvarianceMonitor(png_dir=tmp_path, **options.pop("monitor", {}))
    logger = lc.ViewLogger(4, png_dir=tmp_path, **options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[lc.ViewAugmentation(policy, seed=0), monitor, logger],
    )
    loader = torch.utils.data.DataLoader(images, batch_size=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(lc.SimCLR(net), loader, loader)
    (path,) = tmp_path.glob("views*.png")
    own = [str(w.message) for w in caught if "InvarianceMonitor" in str(w.message) or "ViewLogger" in str(w.message)]
    return monitor, np.asarray(Image.open(path)), own


def smooth(channels):
    """Images (8, channels, 24, 24) in 0.1..0.9."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(8, channels, 4, 4, generator=generator)
    return 0.1 + 0.8 * torch.nn.functional.interpolate(coarse, (24, 24), mode="bilinear")


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (lambda: chest_xray_views(16), 1),
        (lambda: satellite_views(16, channels=4), 4),
        (lambda: satellite_views(16, indices=[(7, 3)]), 13),
    ],
)
@pytest.mark.slow
def test_any_number_of_channels(tmp_path, make, channels):
    monitor, picture, own = run(tmp_path, make(), smooth(channels))
    assert not own
    assert set(monitor.curves) == {"brightness", "contrast", "blur", "crop", "shift", "rotation", "flip"}
    assert all(np.isfinite(value) for curve in monitor.curves.values() for _, value in curve)
    assert picture[30:].std() > 10  # not white


@pytest.mark.parametrize(
    ("make", "scale", "dtype"),
    [
        (lambda **o: satellite_views(16, channels=4, **o), (0, 10_000), torch.int16),
        (lambda **o: ct_views(16, **o), (-1024, 3071), torch.int16),
        (lambda **o: microscopy_views(16, **o), (0, 65_535), torch.uint16),
        (lambda **o: chest_xray_views(16, **o), (-25.0, 0.0), torch.float32),
    ],
)
@pytest.mark.slow
def test_sixteen_bits_are_watched_as_the_same_images_in_0_to_1(tmp_path, make, scale, dtype):
    low, high = scale
    images = smooth(make(scale=scale).channels)
    stored = low + images * (high - low)
    stored = stored if dtype == torch.float32 else stored.round().to(torch.int32).to(dtype)
    both = []
    for name, given, policy in (("stored", stored, make(scale=scale)), ("unit", images, make(scale=None))):
        folder = tmp_path / name
        folder.mkdir()
        both.append(run(folder, policy, given))
    (first, picture, own), (second, other, _) = both
    assert not own
    assert len(first.curves) == 7
    for name, curve in first.curves.items():
        for (_, value), (_, expected) in zip(curve, second.curves[name], strict=True):
            assert value == pytest.approx(expected, abs=0.02)
    original = slice(14, None), slice(0, 68)  # the first column, below its title
    assert np.abs(picture[original].astype(int) - other[original]).max() <= 1


@pytest.mark.slow
def test_the_scale_can_be_given(tmp_path):
    stored = (smooth(4) * 10_000).round().to(torch.int16)
    options = {"images": stored, "scale": (0, 10_000)}
    monitor, _, own = run(tmp_path, satellite_views(16, channels=4, scale=(0, 10_000)), stored, monitor=options)
    assert not own
    assert monitor.curves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": torch.zeros(4, 4, 8, 8, dtype=torch.int16) + 9000}, r"be in 0..1, got .*`scale`"),
        ({"scale": (1, 0)}, "`scale` must be a pair"),
        ({"scale": (0, 1), "mean": [0.5], "std": [0.5]}, "`scale` must be None with `mean`"),
    ],
)
def test_bad_ranges_of_the_monitor(options, message):
    with pytest.raises(ValueError, match=message):
        lc.InvarianceMonitor(**options)
