"""Stains and frequencies: official values, the round trip, and bad inputs."""

import json
from pathlib import Path

import pytest
import torch

from lightning_contrast import augment
from tests.tolerances import FORMULA, NETWORK, bound, f32

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parents[1] / "official_domains.json").read_text(encoding="utf-8"))
}
EIGHT_BITS = 1.5 / 255  # the official result is rounded to levels


def image_of(record):
    """Return the channel-last uint8 image of a record as (1, 3, H, W)."""
    return torch.tensor(record["inputs"]["image"], dtype=torch.uint8).permute(2, 0, 1)[None]


def first(values):
    return torch.tensor(values).permute(2, 0, 1)[None]


@pytest.mark.parametrize("name", ["hed_round_trip", "hed_outside_the_cone"])
def test_official_stains_and_the_way_back(name):
    record = RECORDS[name]
    image = image_of(record)
    stains = augment.rgb_to_hed(image)
    torch.testing.assert_close(stains, first(record["hed"]), **f32(NETWORK))  # ln of values down to 1e-6
    back = augment.hed_to_rgb(stains)
    torch.testing.assert_close(back, first(record["rgb_again"]), **f32(NETWORK))
    error = (back * 255 - image).abs().max().item()
    assert error == pytest.approx(record["largest_error"], abs=1e-2)
    assert (error < 1e-2) == (name == "hed_round_trip")


@pytest.mark.parametrize("as_float", [False, True])
def test_official_jitter(as_float):
    record = RECORDS["hed_jitter"]
    image = image_of(record)
    image = image / 255 if as_float else image
    jittered = augment.stain_jitter(image, **record["params"])
    torch.testing.assert_close(jittered, first(record["rgb_clipped"]), **f32(NETWORK))
    stretched = augment.stain_jitter(image, **record["params"], stretch=True)
    assert (stretched - first(record["value"]) / 255).abs().max() < EIGHT_BITS
    assert (stretched - jittered).abs().max() > 0.05


def test_official_high_frequencies():
    record = RECORDS["high_frequency"]
    images = torch.tensor(record["inputs"]["images"])
    found = augment.high_frequency(images, **record["params"])
    torch.testing.assert_close(found, torch.tensor(record["value"]), **f32(FORMULA))
    assert found.mean((2, 3)).abs().max() < bound(FORMULA)
    torch.testing.assert_close(augment.high_frequency(images, radius=0), images, **f32(FORMULA))


def test_images_without_stain_are_black_or_white():
    """White has no density; black has the largest, and neither becomes NaN."""
    white, black = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    assert not augment.rgb_to_hed(white).any()
    assert torch.equal(augment.stain_jitter(white, scale=(0.5, 2, 1), shift=(0, 0, 0)), white)
    assert augment.stain_jitter(black, scale=(1, 1, 1), shift=(0, 0, 0)).isfinite().all()
    assert augment.stain_jitter(white, scale=(1, 1, 1), shift=(0, 0, 0), stretch=True).isfinite().all()


def test_each_stain_has_its_own_scale():
    """A tile of eosin alone follows the factor of eosin and no other."""
    stains = torch.zeros(1, 3, 4, 4)
    stains[:, 1] = torch.linspace(0.01, 0.1, 16).view(4, 4)
    tile = augment.hed_to_rgb(stains)
    doubled = augment.rgb_to_hed(augment.stain_jitter(tile, scale=(5, 2, 0), shift=(0, 0, 0)))
    torch.testing.assert_close(doubled, 2 * stains, **f32(NETWORK))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: augment.stain_jitter(x, scale=(1, 1), shift=(0, 0, 0)), "`scale` must have one number per stain"),
        (lambda x: augment.stain_jitter(x, scale=(1, 1, 1), shift=(0,)), "`shift` must have one number per stain"),
        (lambda x: augment.rgb_to_hed(x[:, :1]), "have 3 channels"),
        (lambda x: augment.hed_to_rgb(x[:, :2]), "have 3 channels"),
        (lambda x: augment.high_frequency(x, radius=-1), "`radius` must be >= 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(1, 3, 4, 4))
