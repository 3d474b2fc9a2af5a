"""Stain densities of histology: hematoxylin, eosin and DAB, and the jitter of their amounts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_contrast._checks import require
from lightning_contrast.augment.images import as_float, check_policy_input
from lightning_contrast.precision import full_precision

ABSORPTION = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Optical density in red, green and blue of one unit of hematoxylin, eosin and DAB."""

SEPARATION: tuple[tuple[float, ...], ...] = tuple(
    map(tuple, torch.linalg.inv(torch.tensor(ABSORPTION, dtype=torch.float64, device="cpu")).tolist())
)
"""Inverse of `ABSORPTION`: stains of one unit of optical density in red, green and blue."""

DARKEST = 1e-6  # intensity of optical density 1, as in scikit-image


@full_precision
def rgb_to_hed(images: Tensor) -> Tensor:
    """Separate an RGB image into its stains.

    With the absorption matrix M, ``stains = max(ln(max(rgb, 1e-6)) / ln(1e-6) @ inverse(M), 0)``. The colors of stained
    tissue are mixtures of the three stains, and `hed_to_rgb` returns them. Other colors, such as green ink, would need
    a negative amount of a stain, which is set to 0: they do not return.

    Source: Ruifrok and Johnston, "Quantification of histochemical staining by color deconvolution", 2001, and
    scikit-image's ``rgb2hed`` (0.18 and later, whose units differ from those of older versions).

    Args:
        images: RGB, ``(B, 3, H, W)``, uint8 in 0..255 or float in 0..1.

    Returns:
        Hematoxylin, eosin and DAB, ``(B, 3, H, W)`` float32, >= 0; about 0.01 to 0.1 for a section of tissue.

    Raises:
        ValueError: If the images do not have 3 channels.

    Example:
        >>> from lightning_contrast.augment import hed_to_rgb, rgb_to_hed
        >>> purple = torch.tensor([97, 76, 119], dtype=torch.uint8).view(1, 3, 1, 1)
        >>> [round(float(stain), 4) for stain in rgb_to_hed(purple).flatten()]
        [0.0924, 0.0024, 0.036]
        >>> (hed_to_rgb(rgb_to_hed(purple)) * 255).round().flatten().tolist()
        [97.0, 76.0, 119.0]
    """
    pixels = as_float(check_policy_input(images, 3))
    return separate(pixels, pixels.new_tensor(SEPARATION))


@full_precision
def hed_to_rgb(stains: Tensor) -> Tensor:
    """Return the RGB image of stains: ``exp(ln(1e-6) * stains @ M)``, clipped to 0..1; see `rgb_to_hed`.

    Args:
        stains: Hematoxylin, eosin and DAB, ``(B, 3, H, W)`` float.

    Returns:
        ``(B, 3, H, W)`` float32 in 0..1.

    Raises:
        ValueError: If there are not 3 stains.
    """
    stains = check_policy_input(stains, 3)
    return mix(stains, stains.new_tensor(ABSORPTION))


@full_precision
def stain_jitter(images: Tensor, *, scale: Sequence[float], shift: Sequence[float], stretch: bool = False) -> Tensor:
    """Multiply the stains of images by ``scale``, add ``shift``, and return to RGB.

    Source: Tellez et al., https://arxiv.org/abs/1808.05896, with the densities of `rgb_to_hed`. Published strengths
    belong to other units: there ``shift`` is 0.05 or 0.2, here 0.05 changes a tile by 35 of 255 levels on average and
    0.01 by 8.

    Args:
        images: RGB, ``(B, 3, H, W)``, uint8 in 0..255 or float in 0..1.
        scale: Factors of hematoxylin, eosin and DAB.
        shift: Amounts added to the three.
        stretch: Stretch each result from its least to its largest value over 0..1, as the HEDJitter of
            https://github.com/gatsby2016/Augmentation-PyTorch-Transforms does, which changes the contrast.

    Returns:
        ``(B, 3, H, W)`` float32 in 0..1.

    Raises:
        ValueError: If ``scale`` or ``shift`` does not have 3 numbers, or the images do not have 3 channels.
    """
    for name, values in (("scale", scale), ("shift", shift)):
        require(len(values) == 3, name, "have one number per stain", tuple(values), "Give three numbers")
    stains = rgb_to_hed(images)
    factors, amounts = stains.new_tensor(scale).view(1, 3, 1, 1), stains.new_tensor(shift).view(1, 3, 1, 1)
    jittered = mix(stains * factors + amounts, stains.new_tensor(ABSORPTION), clip=not stretch)
    if not stretch:
        return jittered
    low, high = jittered.amin((1, 2, 3), keepdim=True), jittered.amax((1, 2, 3), keepdim=True)
    return (jittered - low) / (high - low).clamp_min(torch.finfo(jittered.dtype).tiny)


def separate(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Return the stains ``(B, 3, H, W)`` of float ``pixels`` of that shape, with `SEPARATION` ``(3, 3)``."""
    density = pixels.clamp_min(DARKEST).log_().mul_(1 / math.log(DARKEST))
    return torch.einsum("bchw,cs->bshw", density, matrix).clamp_min_(0)


def mix(stains: Tensor, matrix: Tensor, *, clip: bool = True) -> Tensor:
    """Return the RGB image ``(B, 3, H, W)`` of ``stains`` of that shape, with `ABSORPTION` ``(3, 3)``."""
    rgb = torch.einsum("bshw,sc->bchw", stains, matrix).mul_(math.log(DARKEST)).exp_()
    return rgb.clamp_(0, 1) if clip else rgb
