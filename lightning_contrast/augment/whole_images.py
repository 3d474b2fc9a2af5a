"""Images of different shapes in one tensor."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast.augment.images import as_float


class WholeImages(Tensor):
    """Images of different shapes, each resized to one square as a whole: a tensor that remembers the shapes.

    `ViewAugmentation` lets view policies crop at the images' own shapes. For all others it is its pixels; results of
    operations are plain tensors, and only `to` and `pin_memory` keep the shapes.

    Args:
        pixels: ``(B, C, S, S)``, uint8 or float; both sides of each image are resized, so its content is stretched.
        sizes: Height and width of each image before the resizing, in pixels, ``(B, 2)`` int64; on the host, where the
            crops are drawn.
    """

    sizes: NDArray[np.int64]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as Parameter has it

    @staticmethod
    def __new__(cls, pixels: Tensor, sizes: NDArray[np.int64]) -> "WholeImages":
        """Return the pixels as a tensor with sizes, of the same memory."""
        images = pixels.as_subclass(cls)
        images.sizes = sizes
        return images

    @property
    def pixels(self) -> Tensor:
        """The images as a plain tensor, of the same memory."""
        return self.as_subclass(Tensor)

    def to(self, *args: Any, **kwargs: Any) -> "WholeImages":
        """Return the images on another device or of another dtype, as `Tensor.to`."""
        return WholeImages(self.pixels.to(*args, **kwargs), self.sizes)

    def pin_memory(self, *args: Any, **kwargs: Any) -> "WholeImages":
        """Return the images in page-locked memory, as `Tensor.pin_memory`."""
        return WholeImages(self.pixels.pin_memory(*args, **kwargs), self.sizes)

    def __reduce_ex__(self, protocol: Any) -> Any:  # between worker processes in shared memory, as plain tensors
        return WholeImages, (self.pixels, self.sizes)


def center_squares(images: WholeImages) -> Tensor:
    """Return the central square of each image at its own shape, ``(B, C, S, S)`` float32 in 0..1.

    Args:
        images: Pixels ``(B, C, S, S)`` and sizes ``(B, 2)``.
    """
    pixels = as_float(images.pixels)
    edge = pixels.shape[-1]
    squares = torch.empty_like(pixels)
    for place, (height, width) in enumerate(images.sizes.tolist()):
        shorter = min(height, width)
        rows, columns = max(1, round(edge * shorter / height)), max(1, round(edge * shorter / width))
        top, left = (edge - rows) // 2, (edge - columns) // 2
        square = pixels[place : place + 1, :, top : top + rows, left : left + columns]
        squares[place] = F.interpolate(square, (edge, edge), mode="bilinear", antialias=True)[0]
    return squares
