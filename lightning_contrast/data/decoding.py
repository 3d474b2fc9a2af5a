"""Decoding of encoded images, in worker processes or on the device."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_contrast.data._folder_images import read_rgb, resized, stacked
from lightning_contrast.seeding import send

_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG"
_ORIENTATION = 0x0112  # EXIF tag


def decode(data: bytes, *, exif: bool = True) -> Tensor:
    """Decode the content of an image file as RGB, uint8 ``(3, H, W)``, with the pixels of `read_rgb`.

    JPEG and PNG are decoded by torchvision, other formats by Pillow.

    Args:
        data: Content of the file.
        exif: Turn the image upright by its EXIF orientation.

    Raises:
        ValueError: If its pixels have more than 8 bits.
        RuntimeError: If the file is damaged.
    """
    if not data.startswith((_JPEG, _PNG)):
        return read_rgb(BytesIO(data), exif=exif)
    from torchvision.io import ImageReadMode, decode_image

    with _quiet():
        pixels: Tensor = decode_image(_bytes(data), mode=ImageReadMode.RGB, apply_exif_orientation=exif)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"it has more than 8 bits ({pixels.dtype}); write its shards from 8-bit images.")
    return pixels


@dataclasses.dataclass
class EncodedImage:
    """One image that is not yet decoded."""

    data: bytes
    orientation: int
    """1 to 8, as in EXIF; 1 is upright."""
    seed: int | None
    """Of a training image, see `resized`; None in evaluation."""


@dataclasses.dataclass
class EncodedBatch:
    """Images of a batch that are decoded on the device, see `decoded_on`.

    Args:
        data: Contents of the files, one after the other, ``(bytes,)`` uint8: one tensor crosses from a worker.
        images: Length in bytes, orientation and seed of each of the B images.
        names: Names of the images, for errors.
        rest: Labels ``(B,)`` and, if they are asked for, positions ``(B,)``.
    """

    data: Tensor
    images: list[tuple[int, int, int | None]]
    names: list[str]
    rest: list[Tensor]

    def pin_memory(self) -> "EncodedBatch":
        """Return the batch with its labels in page-locked memory; the decoder reads its data on the host."""
        return dataclasses.replace(self, rest=[part.pin_memory() for part in self.rest])


def encoded(data: bytes, *, exif: bool, seed: int | None) -> EncodedImage:
    """Return an image with its orientation, which is read from the header of a JPEG.

    Args:
        data: Content of the file.
        exif: Whether to turn it upright.
        seed: See `EncodedImage`.
    """
    orientation = 1
    if exif and data.startswith(_JPEG):
        with Image.open(BytesIO(data)) as image:
            orientation = int(image.getexif().get(_ORIENTATION, 1))
    return EncodedImage(data, orientation, seed)


def encoded_batch(images: Sequence[EncodedImage], names: list[str], rest: list[Tensor]) -> EncodedBatch:
    """Return a batch of encoded images.

    Args:
        images: B images.
        names: Their names.
        rest: Labels ``(B,)`` and further tensors.
    """
    about = [(len(image.data), image.orientation, image.seed) for image in images]
    return EncodedBatch(_bytes(b"".join(image.data for image in images)), about, names, rest)


def decoded_on(
    device: torch.device, batch: EncodedBatch, *, size: int, training: str, evaluation: str, exif: bool
) -> list[Any]:
    """Decode a batch on a device and resize it there: images ``(B, 3, size, size)`` uint8, and the rest of the batch.

    On a CUDA device all JPEGs are decoded by one call of nvJPEG; other formats, and all images on other devices, are
    decoded on the host.

    Args:
        device: Device of the batch.
        batch: See `EncodedBatch`.
        size: Height and width, in pixels.
        training: How training images become squares, see `resized`.
        evaluation: The same for evaluation.
        exif: Turn the images upright.

    Raises:
        RuntimeError: If an image cannot be decoded; the message names it.
    """
    files = list(torch.split(batch.data, [length for length, _, _ in batch.images]))
    on_gpu = {place for place, file in enumerate(files) if device.type == "cuda" and bytes(file[:2].tolist()) == _JPEG}
    jpegs = sorted(on_gpu)
    pixels: dict[int, Tensor] = {}
    if jpegs:
        with contextlib.suppress(RuntimeError):  # one of them is damaged: decoded one by one, it is found
            pixels = dict(zip(jpegs, _by_nvjpeg([files[place] for place in jpegs], device), strict=True))
    squares = []
    for place, (_, orientation, seed) in enumerate(batch.images):
        try:
            if place in on_gpu:
                found = pixels[place] if place in pixels else _by_nvjpeg([files[place]], device)[0]
                image = upright(found, orientation)
            else:
                image = send(decode(files[place].numpy().tobytes(), exif=exif), device)
        except Exception as error:
            reason = str(error).rstrip(".")
            raise RuntimeError(f"Cannot decode the image {batch.names[place]}: {reason}.") from error
        squares.append(resized(image, size, evaluation if seed is None else training, seed))
    return [stacked(squares), *(send(part, device) for part in batch.rest)]


def upright(image: Tensor, orientation: int) -> Tensor:
    """Return an image ``(C, H, W)`` of an EXIF orientation, 1 to 8, turned upright; others are not turned.

    Args:
        image: The pixels as stored.
        orientation: EXIF orientation.
    """
    if orientation in (5, 6, 7, 8):
        image = image.mT
    flips = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}.get(orientation, ())
    return image.flip(flips) if flips else image


def _by_nvjpeg(files: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    with _quiet():
        images: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    return images


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ignore that torchvision 0.29 announces the move of its decoders to TorchCodec."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
        yield


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
