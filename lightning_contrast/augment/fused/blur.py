"""Random Gaussian blur."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_choice, check_probability, fail, require
from lightning_contrast.augment.fused.base import (
    Backend,
    Draw,
    FusedOperation,
    Plan,
    is_empty,
    put_,
    put_back_,
    rows_where,
    take,
    towards,
    uniform,
    uses_accelerator_backend,
)
from lightning_contrast.augment.fused.resample import apply_weights

_REACH = 4.0  # standard deviations that a kernel of unspecified size covers; it misses 6e-5 of the mass
_SMALL = 64  # largest edge in pixels at which a CPU blurs images together by two matrix products
_FEW_TAPS = 2  # largest radius at which sums of shifted images are faster than matrix products
_TILE = 16  # pixels computed by one matrix product of larger images


def blur_weights(kernel: Tensor, size: int) -> Tensor:
    """Return the matrices that blur one axis of each image, with reflected borders.

    Args:
        kernel: Weights at the distances 0, 1, ..., R, ``(B, R + 1)`` with R < ``size``.
        size: Length of the axis in pixels.

    Returns:
        Weights ``(B, size, size)``; each row sums to the sum of the whole kernel.
    """
    pixel = torch.arange(size, device=kernel.device)
    table = F.pad(kernel, (0, 2 * size - kernel.shape[1]))
    distance = (pixel[:, None] - pixel[None, :]).abs()
    weights = table[:, distance]
    # every pixel also contributes as its reflections at both borders, except for the border pixels themselves
    total = pixel[:, None] + pixel[None, :]
    weights[:, :, 1:] += table[:, total[:, 1:]]
    weights[:, :, :-1] += table[:, 2 * (size - 1) - total[:, :-1]]
    return weights


class FusedGaussianBlur(FusedOperation, IntensityAugmentationBase2D):
    """Blur with a Gaussian of random width, with probability ``p`` per image; only selected images are computed.

    Equals ``torchvision.transforms.functional.gaussian_blur`` if ``kernel_size`` is given. Otherwise the kernel extends
    4 sigma to each side, like Pillow's blur, which approximates the Gaussian with box filters.

    Args:
        p: Probability per image.
        sigma: Range of the standard deviation in pixels; drawn uniformly.
        kernel_size: Size of the kernel in pixels, odd; or None. It is truncated if an image is too small to reflect.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).
    """

    def __init__(
        self,
        p: float = 0.5,
        sigma: tuple[float, float] = (0.1, 2.0),
        *,
        kernel_size: int | None = None,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("p", p)
        if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1]:
            fail("sigma", "be an ordered pair above 0", tuple(sigma), "Give (smaller, larger), such as (0.1, 2.0)")
        odd = kernel_size is None or (kernel_size >= 1 and kernel_size % 2 == 1)
        require(odd, "kernel_size", "be odd and >= 1", kernel_size, "Give an odd number of pixels, or None")
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.probability, self.sigma, self.kernel_size, self.backend = p, tuple(sigma), kernel_size, backend
        self.flags = {"probability": p, "sigma": self.sigma, "kernel_size": kernel_size}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``blurred`` ``(B,)``, the images to blur, and ``sigma`` ``(B,)`` in pixels."""
        numbers = uniform(batch, 2)
        widest = towards(self.sigma[1], self.sigma[0], self.share)
        sigma = self.sigma[0] + (widest - self.sigma[0]) * numbers[:, 1]
        return {"blurred": numbers[:, 0] < self.probability, "sigma": sigma.astype(np.float32)}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to blur and their kernels at the distances 0, 1, ..., R, ``(n, R + 1)``."""
        sigma = draw["sigma"][draw["blurred"]]
        radius = np.ceil(_REACH * sigma).astype(np.int64)
        widest = math.ceil(_REACH * self.sigma[1])
        if self.kernel_size is not None:
            widest = min(widest, self.kernel_size // 2)
            radius = np.minimum(radius, widest)
        distance = np.arange(widest + 1, dtype=np.float32)
        kernel = np.exp(-0.5 * (distance / sigma[:, None]) ** 2) * (distance <= radius[:, None])
        kernel /= 2 * kernel.sum(axis=1, keepdims=True) - kernel[:, :1]
        each = list(zip(np.flatnonzero(draw["blurred"]).tolist(), radius.tolist(), strict=True))
        return {"rows": rows_where(draw["blurred"]), "each": each, "kernel": kernel}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Blur rows of ``images`` ``(B, C, H, W)`` in place."""
        if is_empty(plan["rows"]):
            return images
        height, width = images.shape[-2:]
        kernel = plan["kernel"].to(images.dtype)
        radius = kernel.shape[1] - 1
        if min(height, width) > radius and not uses_accelerator_backend(self.backend, images):
            if max(height, width) > _SMALL:
                for (row, reach), band in zip(plan["each"], _bands(kernel), strict=True):
                    unused = radius - reach
                    _blur_by_bands_(images[row], band[unused : len(band) - unused])
                return images
            if radius <= _FEW_TAPS:
                chosen = take(images, plan["rows"])
                _blur_by_sums_(chosen, kernel)
                put_back_(images, plan["rows"], chosen)
                return images
        rows = blur_weights(fit_kernel(kernel, height), height)
        columns = rows if height == width else blur_weights(fit_kernel(kernel, width), width)
        put_(images, plan["rows"], apply_weights(take(images, plan["rows"]), rows, columns))
        return images


def fit_kernel(kernel: Tensor, size: int) -> Tensor:
    """Truncate kernels ``(B, R + 1)`` to R < ``size``, the limit of reflection, and renormalize: ``(B, size)``."""
    if kernel.shape[1] <= size:
        return kernel
    cut = kernel[:, :size]
    return cut / (2 * cut.sum(1, keepdim=True) - cut[:, :1])


def _bands(kernel: Tensor) -> Tensor:
    """Return the banded matrices that blur one axis of a padded tile, from kernels ``(n, R + 1)``.

    Returns:
        Weights ``(n, 16 + 2 R, 16)``.
    """
    radius = kernel.shape[1] - 1
    tile = torch.arange(_TILE, device=kernel.device)
    pixel = torch.arange(-radius, _TILE + radius, device=kernel.device)
    distance = (pixel[:, None] - tile[None, :]).abs().clamp_(max=radius + 1)
    return F.pad(kernel, (0, 1))[:, distance]


def _blur_by_bands_(image: Tensor, band: Tensor) -> None:
    """Blur an image ``(C, H, W)`` in place by two products of its tiles with a banded matrix.

    Each product of 16 rows (or columns) reads R more on both sides: the tiles are overlapping windows into one padded
    image, without copies. Channels are stacked vertically, each a whole number of tiles high; results for the rows
    between two channels are discarded.

    Args:
        image: Overwritten; both edges exceed the radius R.
        band: Weights ``(16 + 2 R, 16)``.
    """
    channels, height, width = image.shape
    window = len(band)
    radius = (window - _TILE) // 2
    across, down, each = -(-width // _TILE), -(-height // _TILE), -(-(height + 2 * radius) // _TILE)
    each = max(each, down + -(-2 * radius // _TILE))
    line = across * _TILE + 2 * radius
    padded = F.pad(image[None], (radius, radius, radius, radius), mode="reflect")[0]
    if padded.shape[1:] != (each * _TILE, line):
        padded = F.pad(padded, (0, line - padded.shape[2], 0, each * _TILE - padded.shape[1]))
    tiles = (channels - 1) * each + down
    windows = padded.as_strided((tiles, window, line), (_TILE * line, line, 1))
    rows = torch.bmm(band.T.expand(tiles, -1, -1), windows)  # (tiles, 16, line)
    lines = tiles * _TILE
    windows = rows.as_strided((across, lines, window), (_TILE, line, 1))
    both = torch.bmm(windows, band.expand(across, -1, -1))  # (across, lines, 16)
    result = both.as_strided((channels, height, across, _TILE), (each * _TILE * _TILE, _TILE, lines * _TILE, 1))
    if width % _TILE == 0:
        torch.unflatten(image, 2, (across, _TILE)).copy_(result)
    else:
        image.copy_(result.flatten(2)[..., :width])


def _blur_by_sums_(images: Tensor, kernel: Tensor) -> None:
    """Blur images ``(n, C, H, W)`` in place by sums of shifted copies, which stay in the cache.

    A padded image is treated as one long row of pixels: shifts along both axes are shifts of that row, and values that
    wrap around line ends fall on the padding.

    Args:
        images: Overwritten.
        kernel: Weights at the distances 0, 1, ..., R, ``(n, R + 1)``; both edges of the images exceed R.
    """
    count, _, height, width = images.shape
    radius = kernel.shape[1] - 1
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    lines, line = height + 2 * radius, width + 2 * radius
    rows = _shifted_sum(padded.view(count, -1), kernel, 1)
    both = _shifted_sum(rows, kernel, line)
    # the sums start `radius` lines and `radius` pixels into the padded image, at the first pixel of the image
    images.copy_(both.as_strided(images.shape, (both.shape[1], lines * line, line, 1)))


def _shifted_sum(pixels: Tensor, kernel: Tensor, step: int) -> Tensor:
    """Return the sum of ``pixels`` ``(n, N)`` shifted by multiples of ``step``, ``(n, N - 2 R step)``."""
    radius = kernel.shape[1] - 1
    length = pixels.shape[1] - 2 * radius * step
    total = pixels[:, radius * step :][:, :length] * kernel[:, :1]
    for distance in range(1, radius + 1):
        near, far = (radius - distance) * step, (radius + distance) * step
        pair = pixels[:, near : near + length] + pixels[:, far : far + length]
        total.add_(pair.mul_(kernel[:, distance : distance + 1]))
    return total
