"""The fused color operation against torchvision's functions, image by image in the drawn order."""

import colorsys

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from lightning_contrast.augment.fused import FusedColorJitter, FusedSolarize
from lightning_contrast.augment.fused.base import to_device
from lightning_contrast.augment.fused.color import shift_hue_
from tests.tolerances import FORMULA, FOUR_DIGITS, NETWORK, f32, near64

CPU = torch.device("cpu")


def run(operation, images, draw):
    return operation.compute_(images.clone(), to_device(operation.prepare(draw), CPU))


def one_by_one(images, draw, *, gray_first=False, additive=False):
    """Apply torchvision's operations to each image."""
    views = []
    for i, image in enumerate(images):
        brightness, contrast, saturation, hue = draw["factors"][i].tolist()
        steps = {
            0: lambda x, b=brightness: (x + b).clamp(0, 1) if additive else TF.adjust_brightness(x, b),
            1: lambda x, c=contrast: TF.adjust_contrast(x, c),
            2: lambda x, s=saturation: TF.adjust_saturation(x, s),
            3: lambda x, h=hue: TF.adjust_hue(x, h),
        }
        gray = bool(draw["gray"][i])
        if gray and gray_first:
            image = TF.rgb_to_grayscale(image, 3)
        for step in draw["order"][i].tolist() if draw["jittered"][i] else []:
            image = steps[step](image)
        if gray and not gray_first:
            image = TF.rgb_to_grayscale(image, 3)
        views.append(image)
    return torch.stack(views)


@pytest.mark.parametrize("gray_first", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_equals_torchvision_in_every_order(emoji, additive, gray_first):
    torch.manual_seed(0)
    images = emoji[::13].double() / 255
    operation = FusedColorJitter(
        0.8, 0.8, 0.8, 0.2, p=0.8, grayscale=0.2, additive_brightness=additive, gray_first=gray_first
    )
    draw = operation.draw(len(images), 32, 32)
    assert len({tuple(order) for order in draw["order"].tolist()}) > 20
    reference = one_by_one(images, draw, additive=additive, gray_first=gray_first)
    # torchvision rounds the luma weight of red to 0.2989; the hue, steep at gray pixels, can amplify the difference
    difference = (run(operation, images, draw) - reference).abs()
    assert difference.mean() < FOUR_DIGITS
    assert difference.flatten().quantile(0.999) < 2e-3


def test_subsets_of_the_operations(emoji):
    torch.manual_seed(0)
    images = emoji[:40].double() / 255
    for strengths in ((0.4, 0, 0, 0), (0, 0.4, 0, 0), (0, 0, 0.4, 0), (0, 0, 0, 0.4), (0.4, 0.4, 0, 0), (0, 0, 0, 0)):
        operation = FusedColorJitter(*strengths)
        draw = operation.draw(40, 32, 32)
        torch.testing.assert_close(run(operation, images, draw), one_by_one(images, draw), atol=1e-3, rtol=0)
        if not any(strengths):
            assert torch.equal(run(operation, images, draw), images)


@pytest.mark.parametrize(
    ("strengths", "grayscale", "most"),
    [((0.8, 0.8, 0.8, 0.2), 0.0, 4e-4), ((0, 0, 0, 0.2), 0.0, 2e-6), ((0, 0, 0, 0), 1.0, 1.1e-4)],
    ids=["jitter of SimCLR", "hue", "grayscale"],
)
def test_differences_to_torchvision_are_those_of_the_page(emoji, strengths, grayscale, most):
    """docs/views.md and the docstring state the largest one: the weight of red, which a later step can amplify."""
    torch.manual_seed(0)
    images = emoji[::5].double() / 255
    operation = FusedColorJitter(*strengths, p=1.0, grayscale=grayscale)
    draw = operation.draw(len(images), 32, 32)
    largest = float((run(operation, images, draw) - one_by_one(images, draw)).abs().max())
    assert most / 4 < largest <= most


def test_sorting_changes_nothing(emoji):
    """Contiguous rows are computed in place, others through copies, with the same result."""
    torch.manual_seed(0)
    images = emoji[:50].float() / 255
    operation = FusedColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8, grayscale=0.2)
    draw = operation.draw(50, 32, 32)
    order = operation.sort_key(draw).argsort(kind="stable")
    sorted_views = run(operation, images[torch.from_numpy(order)], {k: v[order] for k, v in draw.items()})
    assert torch.equal(sorted_views[torch.from_numpy(order.argsort())], run(operation, images, draw))


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 1 / 3, 0.5])
def test_hue_is_that_of_hsv(turns):
    torch.manual_seed(0)
    images = torch.rand(4, 3, 40, 40, dtype=torch.float64)
    images[1] = images[1, :1]  # gray
    images[2] = (images[2] > 0.5).double()  # corners of the cube: ties of channels
    images[3, 0] = images[3, 1]
    result = shift_hue_(images.clone(), torch.full((4,), turns, dtype=torch.float64))
    torch.testing.assert_close(result, TF.adjust_hue(images, turns), **f32(FORMULA))  # which computes in float32
    for image, shifted in zip(images, result, strict=True):
        for pixel, got in zip(image.flatten(1).T[::40].tolist(), shifted.flatten(1).T[::40].tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            assert got == near64(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value), NETWORK, size=1)


def test_rates_and_ranges():
    torch.manual_seed(0)
    draw = FusedColorJitter(0.4, 1.5, 0.8, 0.1, p=0.8, grayscale=0.2).draw(20000, 32, 32)
    assert draw["jittered"].mean() == pytest.approx(0.8, abs=0.01)
    assert draw["gray"].mean() == pytest.approx(0.2, abs=0.01)
    low, high = draw["factors"].min(0), draw["factors"].max(0)
    np.testing.assert_allclose(low, [0.6, 0.0, 0.2, -0.1], atol=1e-2)
    np.testing.assert_allclose(high, [1.4, 2.5, 1.8, 0.1], atol=1e-2)
    first = np.bincount(draw["order"][:, 0], minlength=4) / 20000
    np.testing.assert_allclose(first, 0.25, atol=0.015)


def test_one_channel_keeps_brightness_and_contrast():
    torch.manual_seed(0)
    images = torch.rand(30, 1, 16, 16, dtype=torch.float64)
    operation = FusedColorJitter(0.4, 0.4, 0.4, 0.1, grayscale=0.2)
    draw = operation.draw(30, 16, 16)
    rgb = one_by_one(images.expand(-1, 3, -1, -1), draw)[:, :1]
    torch.testing.assert_close(run(operation, images, draw), rgb, atol=2e-3, rtol=0)


def test_many_channels():
    images = torch.rand(8, 5, 16, 16)
    with pytest.raises(ValueError, match=r"3 channels for saturation, hue and grayscale, got 5\. .*color=False"):
        FusedColorJitter(0.4, 0.4, 0.4, 0.1)(images)
    torch.manual_seed(0)
    operation = FusedColorJitter(0.0, 0.5)
    draw = operation.draw(8, 16, 16)
    factor = torch.from_numpy(draw["factors"][:, 1]).view(-1, 1, 1, 1)
    expected = (factor * images + (1 - factor) * images.mean((1, 2, 3), keepdim=True)).clamp(0, 1)
    torch.testing.assert_close(run(operation, images, draw), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.75, 1.0])
def test_solarize_equals_torchvision(threshold):
    torch.manual_seed(0)
    images = torch.rand(400, 3, 8, 8)
    images[:, 0, 0] = threshold
    operation = FusedSolarize(0.2, threshold=threshold)
    draw = operation.draw(400, 8, 8)
    chosen = torch.from_numpy(draw["solarized"])
    assert chosen.float().mean() == pytest.approx(0.2, abs=0.06)
    result = operation.compute_(images.clone(), to_device(operation.prepare(draw), CPU))
    torch.testing.assert_close(result[chosen], TF.solarize(images[chosen], threshold))
    assert torch.equal(result[~chosen], images[~chosen])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"brightness": -0.1}, "`brightness` must be >= 0"),
        ({"contrast": -1}, "`contrast` must be >= 0"),
        ({"saturation": -1}, "`saturation` must be >= 0"),
        ({"hue": 0.6}, r"`hue` must lie in \[0, 0.5\]"),
        ({"p": 1.1}, "`p` must lie in"),
        ({"grayscale": -0.1}, "`grayscale` must lie in"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FusedColorJitter(**arguments)
    with pytest.raises(ValueError, match="`p` must lie in"):
        FusedSolarize(2.0)
    with pytest.raises(ValueError, match="`threshold` must lie in"):
        FusedSolarize(threshold=128)
