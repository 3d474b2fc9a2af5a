"""Image files of unknown origin as pixels, or a reason why not."""

from io import BytesIO

from PIL import Image
from torch import Tensor

from lightning_contrast.data import read_rgb
from lightning_contrast.serving.limits import MAX_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's names of the formats that are decoded."""


class RefusedImageError(ValueError):
    """An image that is not decoded.

    Args:
        code: A word for programs: "empty_image", "not_an_image", "too_many_pixels", "unsupported_pixels",
            "damaged_image" or "too_elongated".
        reason: A sentence for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def decode_image(data: bytes, *, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image file as the data modules do: RGB, upright by its EXIF orientation.

    Of an animation the first frame is taken, transparency is dropped, and CMYK is converted by Pillow. The number of
    pixels is taken from the header, before any are decoded.

    Args:
        data: Content of the file.
        size: Height and width to which the image will be resized with a center crop, in pixels. Images that are so
            elongated that this makes more than ``max_pixels`` are refused.
        max_pixels: Largest number of pixels.

    Returns:
        Pixels (3, H, W), uint8.

    Raises:
        RefusedImageError: If it is not an image of a known format, is damaged, too large or too elongated, or has
            more than 8 bits in one channel.
    """
    if not data:
        raise RefusedImageError("empty_image", "The file is empty.")
    known = ", ".join(FORMATS)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            (width, height), mode = image.size, image.mode
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RefusedImageError("too_many_pixels", f"The image has more than {max_pixels} pixels.") from error
    except Exception as error:  # Pillow's readers raise errors of many types
        raise RefusedImageError("not_an_image", f"The file is not an image that can be read ({known}).") from error
    if width * height > max_pixels:
        raise RefusedImageError("too_many_pixels", f"The image has {width} x {height} pixels, more than {max_pixels}.")
    if width * height == 0:
        raise RefusedImageError("damaged_image", "The image has no pixels.")
    if mode[0] in "IF":
        reason = f"The image has more than 8 bits per channel (Pillow's mode {mode}); convert it to 8 bits."
        raise RefusedImageError("unsupported_pixels", reason)
    if size is not None and _resized_area(size, (height, width)) > max_pixels:
        reason = (
            f"An image of {width} x {height} pixels is too elongated: resized for the model it has too many pixels."
        )
        raise RefusedImageError("too_elongated", reason)
    try:
        return read_rgb(BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise RefusedImageError("damaged_image", f"The image is damaged: {_first_line(error)}.") from error


def _resized_area(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """Return the pixels of an image that is resized so that it covers ``size``, upright or turned."""
    upright, turned = (max(size[0] / h, size[1] / w) ** 2 * h * w for h, w in (shape, shape[::-1]))
    return max(upright, turned)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".")[:200] if text else type(error).__name__
