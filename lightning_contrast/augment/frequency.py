"""Frequencies of images."""

import torch
from torch import Tensor

from lightning_contrast._checks import check_not_negative
from lightning_contrast.augment.images import as_float
from lightning_contrast.contracts import check_images
from lightning_contrast.precision import full_precision


@full_precision
def high_frequency(images: Tensor, *, radius: float) -> Tensor:
    """Return images without their low frequencies, those nearer than ``radius`` to the frequency 0.

    Source: AdvCL, https://arxiv.org/abs/2111.01124, whose third view this is with a radius of 8 at 32 pixels.

    Args:
        images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1.
        radius: Distance in steps of the discrete spectrum, >= 0; frequencies at that distance are kept.

    Returns:
        ``(B, C, H, W)`` float32, the real part, not clipped: values around 0, of mean 0 if ``radius`` is above 0.

    Raises:
        ValueError: If ``radius`` is below 0 or the images are not 4-D.

    Example:
        >>> from lightning_contrast.augment import high_frequency
        >>> high_frequency(torch.ones(1, 1, 2, 2), radius=1).flatten().tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    check_not_negative("radius", radius)
    pixels = as_float(check_images(images, values=False, evaluating=False))
    height, width = pixels.shape[-2:]
    down = torch.fft.fftfreq(height, 1 / height, device=pixels.device, dtype=pixels.dtype)
    across = torch.fft.fftfreq(width, 1 / width, device=pixels.device, dtype=pixels.dtype)
    kept = down[:, None].square() + across.square() >= radius**2
    spectrum = torch.fft.fft2(pixels) * kept
    real: Tensor = torch.fft.ifft2(spectrum).real
    return real.contiguous()
