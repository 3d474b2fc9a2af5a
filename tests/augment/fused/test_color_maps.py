"""Color steps merged into maps, against one step after the other."""

import itertools

import numpy as np
import pytest

from lightning_contrast.augment.fused.color import BRIGHTNESS, CONTRAST, HUE, MAPS, SATURATION, color_maps
from tests.tolerances import FORMULA, ROUNDED, f32

LUMA = np.array([0.299, 0.587, 0.114])


def gray(pixels):
    return np.einsum("c,cp->p", LUMA, pixels)


def step_by_step(pixels, kinds, factors, additive):
    """Apply one step after the other to pixels (3, P) and cut each time; the hue is a turn of the channels here."""
    for kind, factor in zip(kinds, factors, strict=True):
        if kind == HUE:
            pixels = np.roll(pixels, 1, axis=0)
        elif kind == BRIGHTNESS:
            pixels = pixels + factor if additive else pixels * factor
        elif kind == CONTRAST:
            pixels = factor * pixels + (1 - factor) * gray(pixels).mean()
        else:
            pixels = factor * pixels + (1 - factor) * gray(pixels)
        pixels = pixels.clip(0, 1)
    return pixels


def by_maps(pixels, numbers, hue):
    """Apply the maps of one image, all of them, and the hue in the middle."""
    for place, (gain, share, weight, offset) in enumerate(numbers.astype(np.float64)):
        if place == MAPS and hue:
            pixels = np.roll(pixels, 1, axis=0)
        luma = gray(pixels)
        pixels = (gain * pixels + share * luma + weight * luma.mean() + offset).clip(0, 1)
    return pixels


def steps_of(seed, batch, additive):
    """Draw steps in every order, a fifth of the factors neutral, a grayscale at the end or at the start."""
    rng = np.random.default_rng(seed)
    orders = np.array(list(itertools.permutations(range(4))))
    kinds = orders[rng.integers(len(orders), size=batch)]
    factors = rng.uniform(0, 2, kinds.shape)
    factors[kinds == BRIGHTNESS] -= 1 if additive else 0
    neutral = np.where((kinds == BRIGHTNESS) & additive, 0, 1)
    factors = np.where(rng.random(kinds.shape) < 0.2, neutral, factors)
    grays = (rng.random((batch, 1)) < 0.7).astype(float)
    join = [(np.full((batch, 1), SATURATION), grays), (kinds, factors)]
    join = join if seed % 2 else join[::-1]
    kinds, factors = (np.concatenate(parts, axis=1) for parts in zip(*join, strict=True))
    return kinds, factors.astype(np.float32)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_one_step_after_the_other(seed, additive):
    kinds, factors = steps_of(seed, 300, additive)
    maps = color_maps(kinds, factors, additive_brightness=additive)
    images = np.random.default_rng(9).random((300, 3, 20))
    for image, kind, factor, numbers in zip(images, kinds, factors, maps.numbers, strict=True):
        expected = step_by_step(image, kind, factor.astype(np.float64), additive)
        np.testing.assert_allclose(by_maps(image, numbers, hue=True), expected, **f32(FORMULA))


@pytest.mark.parametrize("additive", [False, True])
def test_counts_are_those_of_the_maps(additive):
    """The used maps come first in each half, and the others are the identity."""
    kinds, factors = steps_of(0, 500, additive)
    maps = color_maps(kinds, factors, additive_brightness=additive)
    identity = (maps.numbers == [1, 0, 0, 0]).all(axis=2).reshape(-1, 2, MAPS)
    unused = np.arange(MAPS) >= maps.counts[:, :, None]
    assert identity[unused].all()
    # brightness 0.5 and 2 would be one map if nothing were cut between, so no product of factors is 1 by chance
    assert not identity[~unused].any()


def test_steps_that_stay_inside_need_one_map():
    factors = np.array([[0.5, 0.25, 0.75]], np.float32)
    maps = color_maps(np.array([[BRIGHTNESS, CONTRAST, SATURATION]]), factors)
    assert maps.counts.tolist() == [[0, 1]]  # no hue: all is after it
    np.testing.assert_allclose(maps.numbers[0, MAPS], [0.5 * 0.25 * 0.75, 0.125 * 0.25, 0.5 - 0.125, 0], **f32(ROUNDED))


def test_steps_that_may_leave_the_range_end_a_map():
    kinds = np.array([[BRIGHTNESS, CONTRAST, HUE, SATURATION, BRIGHTNESS]] * 3)
    factors = np.array([[2, 2, 9, 0.5, 0.5], [0.5, 2, 9, 1.5, 0.5], [1, 1, 9, 1, 1]], np.float32)
    assert color_maps(kinds, factors).counts.tolist() == [[2, 1], [1, 2], [0, 0]]


def test_the_most_maps():
    """Every step may leave the range, and a grayscale follows: the largest number there is room for."""
    kinds = np.array(
        [[HUE, BRIGHTNESS, CONTRAST, SATURATION, SATURATION], [BRIGHTNESS, CONTRAST, SATURATION] + [HUE] * 2]
    )
    factors = np.array([[9, 2, 2, 2, 0], [2, 2, 2, 9, 9]], np.float32)
    maps = color_maps(kinds[:1], factors[:1])
    assert maps.counts.tolist() == [[0, MAPS]]
    assert maps.numbers.shape == (1, 2 * MAPS, 4)
