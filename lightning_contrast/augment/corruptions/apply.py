"""One function for all corruptions."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.augment.corruptions.blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from lightning_contrast.augment.corruptions.color import brightness, contrast, saturate
from lightning_contrast.augment.corruptions.digital import elastic_transform, jpeg_compression, pixelate, spatter
from lightning_contrast.augment.corruptions.draws import ImageDraws
from lightning_contrast.augment.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from lightning_contrast.augment.corruptions.severities import TABLES, Table
from lightning_contrast.augment.corruptions.weather import add_frost, fog, snow

_BENCHMARK = (
    *(gaussian_noise, shot_noise, impulse_noise),
    *(defocus_blur, glass_blur, motion_blur, zoom_blur),
    *(snow, add_frost, fog, brightness),
    *(contrast, elastic_transform, pixelate, jpeg_compression),
)
_HELD_OUT = (speckle_noise, gaussian_blur, spatter, saturate)
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__.removeprefix("add_"): function for function in (*_BENCHMARK, *_HELD_OUT)
}
_SMALLEST = 16

CORRUPTIONS: tuple[str, ...] = tuple(_FUNCTIONS)[: len(_BENCHMARK)]
"""Names of the 15 corruptions of the benchmark."""
HELD_OUT_CORRUPTIONS: tuple[str, ...] = tuple(_FUNCTIONS)[len(_BENCHMARK) :]
"""Names of the four that are kept for validation."""

ImageT = TypeVar("ImageT", Tensor, NDArray[np.uint8])


@torch.no_grad()
def corrupt(
    image: ImageT,
    name: str,
    *,
    severity: int,
    seed: int = 0,
    table: Table = "imagenet",
    frost: Tensor | None = None,
) -> ImageT:
    """Corrupt images as in ImageNet-C and CIFAR-10-C.

    Source: https://arxiv.org/abs/1903.12261 and the reference implementation: its parameters, its borders, and the
    truncation to 8 bits at the end. The benchmark corrupts 224 x 224 crops, before any normalization, and stores them
    as JPEG of quality 85 (not done here). Computed in float64 on the device of the images; JPEG and pixelate are
    Pillow's, on the CPU.

    Differs from it: random numbers come from ``seed`` and not from NumPy's global generator; images may have any size;
    motion blur and the flakes of snow follow ImageMagick's formula without ImageMagick; frost needs the benchmark's
    pictures (``frost=``) and is a generated texture without them; the distances of the water in spatter are exact.
    Gray images are corrupted as RGB, and their first channel is kept.

    Args:
        image: uint8, a tensor ``(C, H, W)`` or ``(B, C, H, W)``, or an array ``(H, W, C)`` or ``(B, H, W, C)``; C is 1
            or 3. A tensor with its channels last is recognized by their number.
        name: One of `CORRUPTIONS` or `HELD_OUT_CORRUPTIONS`.
        severity: 1 to 5.
        seed: Seed of the first image, >= 0; image i of a batch has seed + i, so a batch gives what its images give.
        table: Parameters of "imagenet" (224 x 224), or of "cifar" (32 x 32).
        frost: Pictures of frost, uint8 ``(n, 3, h, w)``, at least as large as the images.

    Returns:
        uint8, of the type, shape and device of ``image``.

    Raises:
        ValueError: If a name, number or shape is not one of those above.
        TypeError: If the images are not uint8.

    Example:
        >>> images = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
        >>> corrupt(images, "brightness", severity=3, table="cifar")[0, :, 0, 0]
        tensor([138, 138, 138], dtype=torch.uint8)
    """
    check_choice("name", name, _FUNCTIONS)
    check_choice("severity", severity, (1, 2, 3, 4, 5))
    check_choice("table", table, TABLES)
    check_at_least("seed", seed, 0)
    images, restore = _batched(image)
    setting, options = TABLES[table][name][severity - 1], {}
    if name == "frost" and frost is not None:
        fits = frost.ndim == 4 and frost.shape[1] == 3 and frost.dtype == torch.uint8
        fits = fits and all(edge >= part for edge, part in zip(frost.shape[2:], images.shape[2:], strict=True))
        hint = f"Pictures must be at least {tuple(images.shape[2:])} large"
        require(fits, "frost", "be uint8 (n, 3, h, w)", f"{tuple(frost.shape)} {frost.dtype}", hint)
        options["pictures"] = frost
    number = list(_FUNCTIONS).index(name)
    draws = ImageDraws([(seed + i, number, severity) for i in range(len(images))], images.device)
    corrupted = _FUNCTIONS[name](images.double() / 255, setting, draws, **options)
    result: ImageT = restore((255 * corrupted.clamp(0, 1)).to(torch.uint8))
    return result


def _batched(image: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return images as ``(B, 3, H, W)``, and the function that gives results the form of the input."""
    given = torch.from_numpy(image) if isinstance(image, np.ndarray) else image
    if not isinstance(given, Tensor) or given.dtype != torch.uint8:
        got = str(getattr(image, "dtype", type(image).__name__))
        fail("image", "be a uint8 tensor or array", got, "Corrupt raw images, before normalization", TypeError)
    shape = tuple(given.shape)
    require(given.ndim in (3, 4), "image", "be 3-D or 4-D", shape, "Give (C, H, W) or (B, C, H, W)")
    images = given if given.ndim == 4 else given.unsqueeze(0)
    last = isinstance(image, np.ndarray) or images.shape[1] not in (1, 3)
    images = images.permute(0, 3, 1, 2) if last else images
    channels, height, width = images.shape[1:]
    require(channels in (1, 3), "image", "have 1 or 3 channels", shape, "Give gray or RGB images")
    big = min(height, width) >= _SMALLEST and len(images) > 0
    require(big, "image", f"be at least {_SMALLEST} x {_SMALLEST} pixels", shape, "Enlarge the images")

    def restore(result: Tensor) -> Any:
        result = result[:, :channels]
        result = result.permute(0, 2, 3, 1) if last else result
        result = (result if given.ndim == 4 else result[0]).contiguous()
        return result.numpy() if isinstance(image, np.ndarray) else result

    return images.expand(-1, 3, -1, -1), restore
