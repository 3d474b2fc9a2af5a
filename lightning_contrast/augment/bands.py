"""Index channels of multispectral images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_contrast._checks import require

Pairs = Sequence[tuple[int, int]]
_SAME = 0.01  # an index in 0..1 that differs less from that of its bands is theirs, in bfloat16 too


def check_indices(indices: Pairs, channels: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs of bands as a tuple, after checking that they are different bands of ``channels``."""
    for pair in indices:
        ok = len(pair) == 2 and pair[0] != pair[1] and all(0 <= band < channels for band in pair)
        hint = "Count the bands from 0, such as (7, 3) for the NDVI of Sentinel-2's 13 bands"
        require(ok, "indices", f"hold pairs of two of the {channels} bands", tuple(pair), hint)
    return tuple((int(first), int(second)) for first, second in indices)


def append_indices(images: Tensor, indices: Pairs) -> Tensor:
    """Append normalized differences ``(a - b) / (a + b)`` of bands as channels, mapped from -1..1 to 0..1.

    A factor common to both bands leaves an index as it is. Bands that are both 0 have the index 0, mapped to 0.5.

    Args:
        images: ``(B, C, H, W)`` float in 0..1, proportional to reflectance.
        indices: Pairs (a, b) of bands, counted from 0. NDVI is (near infrared, red), NDWI (green, near infrared).

    Returns:
        ``(B, C + I, H, W)`` for I pairs.

    Raises:
        ValueError: If a pair is not two different bands of the images.

    Example:
        >>> red_and_infrared = torch.tensor([0.1, 0.3]).view(1, 2, 1, 1)
        >>> append_indices(red_and_infrared, [(1, 0)]).flatten().tolist()
        [0.10000000149011612, 0.30000001192092896, 0.75]
    """
    pairs = check_indices(indices, images.shape[1])
    tiny = torch.finfo(images.dtype).tiny
    ratios = []
    for first, second in pairs:
        total = images[:, first] + images[:, second]
        ratios.append((images[:, first] / total.clamp_min(tiny)).masked_fill(total <= 0, 0.5))  # = (1 + index) / 2
    return torch.cat([images, *(ratio[:, None] for ratio in ratios)], dim=1)


def follow_indices(images: Tensor, bands: Tensor, indices: Pairs) -> Tensor:
    """Return images with other bands, whose index channels follow the bands.

    An index is computed again where it was that of its bands, and stays where it was not, such as one that was dropped
    or whose bands were. The result is differentiable with respect to the bands.

    Args:
        images: Images with index channels, ``(B, C + I, H, W)`` float in 0..1, as `append_indices` returns.
        bands: The other bands, ``(B, C, H, W)``.
        indices: Pairs of bands, as for `append_indices`; without any the result is ``bands``.

    Returns:
        ``(B, C + I, H, W)``.
    """
    if not indices:
        return bands
    count = bands.shape[1]
    before, given = append_indices(images[:, :count], indices)[:, count:], images[:, count:]
    after = append_indices(bands, indices)[:, count:]
    return torch.cat([bands, torch.where((before - given).abs() < _SAME, after, given)], dim=1)
