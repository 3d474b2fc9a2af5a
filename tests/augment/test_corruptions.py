"""Corruptions of ImageNet-C: bytes and statistics of the reference implementation, seeds, layouts and bad input."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_contrast.augment import CORRUPTIONS, HELD_OUT_CORRUPTIONS, corrupt
from lightning_contrast.augment.corruptions.blur import _copied_from
from lightning_contrast.augment.corruptions.color import from_hsv, to_hsv
from lightning_contrast.augment.corruptions.draws import ImageDraws
from lightning_contrast.augment.corruptions.filters import gaussian, motion_blur, smooth_field
from lightning_contrast.augment.corruptions.liquid import distance_to, edges, equalize
from lightning_contrast.augment.corruptions.severities import TABLES
from tests.tolerances import FORMULA, assert_same_bits, f64

RECORDS = json.loads(Path(__file__).with_name("official_corruptions.json").read_text())
ALL = CORRUPTIONS + HELD_OUT_CORRUPTIONS


def make_image():
    y, x = np.mgrid[:224, :224]
    image = np.stack([((x + 2 * y) % 256 + 128) // 2, ((x**2 + y**2) // 37) % 256, 255 - (x ^ y) % 256], -1)
    image[(x - 112) ** 2 + (y - 112) ** 2 < 1600] = (200, 90, 40)
    return image.astype(np.uint8)


IMAGE = make_image()
SMALL = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("record", RECORDS[:-1], ids=lambda record: record["name"])
def test_pixels_are_those_of_the_reference(record):
    name = record["name"].removeprefix("imagenet_c_")
    for expected in record["value"]:
        found = corrupt(IMAGE, name, severity=expected["severity"])
        pixels = np.array([found[y, x] for y, x in record["params"]["points"]]).astype(int)
        levels = 3 if name == "jpeg_compression" else 1
        assert np.abs(pixels - expected["pixels"]).max() <= levels
        assert found.mean((0, 1)) == pytest.approx(expected["mean"], abs=0.1)
        assert found.std((0, 1)) == pytest.approx(expected["std"], abs=0.15)
        if name in ("pixelate", "brightness", "saturate", "contrast"):  # no library decides about the last digit
            assert hashlib.sha256(found.tobytes()).hexdigest() == expected["sha256_uint8"]


@pytest.mark.parametrize("record", RECORDS[-1]["value"], ids=lambda record: f"{record['name']}-{record['severity']}")
def test_random_corruptions_change_as_much_as_those_of_the_reference(record):
    name, severity, seeds = record["name"], record["severity"], 4
    images = torch.from_numpy(IMAGE).permute(2, 0, 1).expand(seeds, -1, -1, -1)
    change = (corrupt(images, name, severity=severity).double() - images.double()).abs().mean().item()
    bound = 4 * record["std_over_seeds"] + 0.02 * record["mean_absolute_change"]
    assert change == pytest.approx(record["mean_absolute_change"], abs=bound)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("table", TABLES)
def test_a_batch_gives_what_its_images_give_and_a_seed_decides(name, table):
    state = torch.get_rng_state()
    batch = corrupt(SMALL, name, severity=3, seed=5, table=table)
    assert batch.shape == SMALL.shape
    assert batch.dtype == torch.uint8
    assert not torch.equal(batch, SMALL)
    assert_same_bits(batch[2], corrupt(SMALL[2], name, severity=3, seed=7, table=table))
    other = corrupt(SMALL, name, severity=3, seed=50, table=table)
    fixed = ("defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "contrast", "saturate", "pixelate")
    assert torch.equal(batch, other) == (name in (*fixed, "jpeg_compression"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["fog", "jpeg_compression", "spatter", "saturate"])
def test_layouts_of_tensors_and_arrays_give_the_same(name):
    first = corrupt(SMALL, name, severity=2, table="cifar")
    array = corrupt(SMALL.permute(0, 2, 3, 1).numpy(), name, severity=2, table="cifar")
    last = corrupt(SMALL.permute(0, 2, 3, 1), name, severity=2, table="cifar")
    assert isinstance(array, np.ndarray)
    assert_same_bits(torch.from_numpy(array).permute(0, 3, 1, 2), first)
    assert_same_bits(last.permute(0, 3, 1, 2), first)
    gray = corrupt(SMALL[:, :1], name, severity=2, table="cifar")
    assert gray.shape == (3, 1, 32, 32)


@pytest.mark.parametrize("name", ALL)
def test_every_corruption_changes_more_at_severity_5_than_at_1(name):
    yes = {s: corrupt(IMAGE[:160, :192], name, severity=s).astype(float) for s in (1, 5)}
    change = {s: np.abs(image - IMAGE[:160, :192]).mean() for s, image in yes.items()}
    if name not in ("elastic_transform", "frost", "saturate"):  # severities 1 and 2 are of another kind there
        assert change[5] > change[1]


def test_glass_copies_pixels_as_a_loop_does():
    height, width, reach = 9, 11, 2
    draws = ImageDraws([(0, 0)], torch.device("cpu"))
    found = _copied_from(height, width, reach, draws)[0]
    offsets = ImageDraws([(0, 0)], torch.device("cpu")).integers(-reach, reach, 5, 7, 2)[0]
    value = torch.arange(height * width).view(height, width)
    for y in range(height - reach, reach, -1):
        for x in range(width - reach, reach, -1):
            dx, dy = offsets[y - 3, x - 3].tolist()
            value[y, x] = value[y + dy, x + dx].clone()
    assert torch.equal(value.view(-1), found)


def test_filters_and_colors_against_scipy_and_themselves():
    from scipy import ndimage

    x = torch.rand(2, 20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_same_bits(gaussian(x, 2.0), torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 2, 2), mode="nearest")))
    wide = ndimage.gaussian_filter(x.numpy(), (0, 50, 50), mode="reflect", truncate=3)
    torch.testing.assert_close(smooth_field(x, 50, truncate=3), torch.from_numpy(wide), **f64(FORMULA, size=2))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(from_hsv(*to_hsv(images)), images, **f64(FORMULA, size=1))
    mask = torch.zeros(1, 1, 20, 24, dtype=torch.bool)
    mask[0, 0, 3, 4] = mask[0, 0, 12, 20] = True
    expected = torch.from_numpy(ndimage.distance_transform_edt(~mask[0, 0].numpy())).clamp(max=20)
    torch.testing.assert_close(distance_to(mask)[0, 0], expected, **f64(FORMULA))


def test_motion_is_along_its_direction():
    images = torch.zeros(2, 1, 21, 21, dtype=torch.float64)
    images[:, :, 10, 10] = 1
    blurred = motion_blur(images, 5, 3, torch.tensor([0.0, -90.0], dtype=torch.float64))
    assert blurred[0, 0].nonzero()[:, 0].tolist() == [10] * 11
    assert blurred[1, 0].nonzero()[:, 1].tolist() == [10] * 11
    torch.testing.assert_close(blurred.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64), **f64(FORMULA))


def test_the_water_has_the_edges_of_its_drops():
    drop = torch.zeros(1, 1, 24, 24, dtype=torch.float64)
    drop[..., 8:16, 8:16] = 200
    found = edges(drop)[0, 0]
    assert found.any()
    assert not found[10:14, 10:14].any()
    assert not found[:6].any()
    assert equalize(torch.tensor([[[[3.0, 3.0, 7.0, 9.0]]]])).flatten().tolist() == [0, 0, 128, 255]


def test_frost_of_pictures():
    pictures = torch.full((2, 3, 40, 40), 200, dtype=torch.uint8)
    found = corrupt(SMALL, "frost", severity=1, frost=pictures)
    expected = (SMALL.double() + 0.4 * 200).clamp(max=255)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1)
    with pytest.raises(ValueError, match="`frost` must be uint8"):
        corrupt(SMALL, "frost", severity=1, frost=pictures[:, :, :20])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((SMALL, "frosty", 1), ValueError, "`name` must be one of .* Did you mean 'frost'"),
        ((SMALL, "fog", 0), ValueError, "`severity` must be one of"),
        ((SMALL.float(), "fog", 1), TypeError, "`image` must be a uint8 tensor"),
        ((SMALL[0, 0], "fog", 1), ValueError, "`image` must be 3-D or 4-D"),
        ((SMALL[:, :2], "fog", 1), ValueError, "`image` must have 1 or 3 channels"),
        ((SMALL[..., :8], "fog", 1), ValueError, "`image` must be at least 16 x 16"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        corrupt(*arguments[:2], severity=arguments[2])
