"""Every domain's policy with 1 to 13 channels, of 8 and 16 bits and as floats on a scale of their own."""

import pytest
import torch

from tests.augment.test_policies import DOMAINS

OTHER_CHANNELS = {"driving_views": {"snow": 0.0, "rain": 0.0}}  # what images that are not RGB need
HOUNSFIELD = (-1024, 3071)
SCALES = {torch.uint8: None, torch.uint16: (0, 65_535), torch.int16: HOUNSFIELD, torch.float32: HOUNSFIELD}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("name", sorted(DOMAINS.keys() - {"histology_views"}))
def test_views_of_any_channels_and_depth_are_those_of_the_same_pixels_in_0_to_1(name, channels, fused):
    options = {"channels": channels, "color": channels in (1, 3), "fused": fused}
    options |= {} if channels == 3 else OTHER_CHANNELS.get(name, {})
    levels = torch.randint(0, 256, (3, channels, 24, 20), generator=torch.Generator().manual_seed(0)) / 255
    for dtype, scale in SCALES.items():
        if name == "ct_views" and scale == (0, 65_535):
            continue  # its window is in Hounsfield units
        low, high = scale or (0, 255)
        stored = low + levels * (high - low)
        stored = stored if dtype == torch.float32 else stored.round().to(torch.int32).to(dtype)
        pixels = (stored.float() - low) / (high - low)
        views = []
        for images, of in ((stored, scale), (pixels, None)):
            policy = DOMAINS[name](16, scale=of, **options)
            torch.manual_seed(1)
            views.append([*policy(images), policy.eval_transform(images)])
        for given, same in zip(*views, strict=True):
            assert given.shape == (3, channels, 16, 16)
            assert given.dtype == torch.float32
            # crops of uint8 are rounded to 8 bits; JPEG rounds what differs by one epsilon
            most = 0.02 if dtype == torch.uint8 else 1e-3
            assert float((given - same).abs().mean()) < most, dtype


@pytest.mark.parametrize("channels", [1, 4])
def test_stains_need_three_channels(channels):
    with pytest.raises(ValueError, match=f"`channels` must be 3 for stains, got {channels}"):
        DOMAINS["histology_views"](16, channels=channels)
