"""Brightness, contrast, saturation and grayscale as maps of the colour channels, put together where that is exact."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
MAPS = 4  # that an image can need before its hue is shifted, and after it

# Whether a step multiplies colour, grey image and mean grey by its factor: brightness, contrast, saturation, hue.
_MULTIPLIES = np.array([(True, True, True), (True, True, False), (True, False, False), (False, False, False)])


class ColorMaps(NamedTuple):
    """The maps of each image of a batch.

    Attributes:
        numbers: Gain, share, weight and offset of each map, ``(B, 2 * MAPS, 4)``: ``MAPS`` before the hue and as many
            after it, unused ones the identity.
        counts: How many are used before and after the hue, ``(B, 2)``; all are after it where there is none.
    """

    numbers: NDArray[np.float32]
    counts: NDArray[np.int64]


def color_maps(
    kinds: NDArray[np.int64], factors: NDArray[np.float32], *, additive_brightness: bool = False
) -> ColorMaps:
    """Put the steps of each image together into as few maps as give the same as one step after the other.

    With grey(x) the luma, every step but the hue is ``x -> gain * x + share * grey(x) + weight * mean(grey(x)) +
    offset``, and so is a sequence of steps: an image is the sum of its colour ``x - grey(x)``, its grey image
    ``grey(x) - mean(grey(x))`` and its mean, of which a step multiplies some by its factor. Values are cut to 0..1
    after each step; only a step that makes images brighter, richer in contrast or more saturated can leave that range,
    so that a map ends there, and at the hue.

    Args:
        kinds: What each step does, ``(B, S)``: `BRIGHTNESS`, `CONTRAST`, `SATURATION` or, at most once, `HUE`; at most
            `MAPS` steps but the hue.
        factors: The factor of each step, ``(B, S)``, >= 0; 1 changes nothing. Those of the hue are not read.
        additive_brightness: Factors of brightness are added, in -1..1; 0 changes nothing.
    """
    hue = kinds == HUE
    added = (kinds == BRIGHTNESS) & additive_brightness
    changes = ~hue & (factors != np.where(added, 0, 1))
    ends = changes & (added | (factors > 1))
    half = hue.cumsum(axis=1)
    half[half[:, -1] == 0] = 1
    place = ends.cumsum(axis=1) - ends
    place -= half * (ends & (half == 0)).sum(axis=1, keepdims=True)
    slot = MAPS * half + place
    rows = np.arange(len(kinds))
    factors_of = np.where(_MULTIPLIES[kinds] & ~added[..., None], factors[..., None], np.float32(1))
    scale = np.ones((len(kinds), 2 * MAPS, 3), np.float32)
    offset = np.zeros((len(kinds), 2 * MAPS), np.float32)
    for step in range(kinds.shape[1]):
        scale[rows, slot[:, step]] *= factors_of[:, step]
        if additive_brightness:
            offset[rows, slot[:, step]] += np.where(added[:, step], factors[:, step], 0)  # what ends a map
    gain, share, weight = scale[..., 0], scale[..., 1] - scale[..., 0], scale[..., 2] - scale[..., 1]
    counts = [((place + 1) * (changes & (half == h))).max(axis=1) for h in (0, 1)]
    return ColorMaps(np.stack([gain, share, weight, offset], axis=2), np.stack(counts, axis=1))
