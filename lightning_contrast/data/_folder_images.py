"""Dataset of image files that are decoded and resized; unreadable files raise or are skipped."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Literal, NoReturn, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_contrast.augment.whole_images import WholeImages

Loader = Callable[[str], Any]
Unreadable: TypeAlias = Literal["raise", "replace", "leave out"]
Sample: TypeAlias = tuple[Tensor, int, int]
_MOST_IN_A_ROW = 100  # unreadable files before an error
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of this EXIF orientation upright, as `PIL.ImageOps.exif_transpose`."""


class FolderImages(Dataset[Sample | None]):
    """Image files, decoded and resized on access.

    Args:
        paths: The files.
        labels: Class index of each file, -1 for none.
        size: Height and width, in pixels.
        resize: "whole", "crop", "center" or "squash".
        loader: Function that reads one file.
        indices: Whether batches include the positions.

    Attributes:
        unreadable: Files that could not be read so far, ``(N,)`` bool; in memory shared by all workers.
    """

    what = "image"
    takes_seeds = True
    """The training order gives `SeededIndex`es; all other loaders give plain indices and get central squares."""

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        size: int,
        resize: str,
        loader: Loader,
        *,
        indices: bool = False,
    ) -> None:
        self.paths, self.labels, self.size, self.resize = paths, labels, size, resize
        self.loader, self.indices = loader, indices
        self.unreadable = torch.zeros(len(paths), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._on_error: Unreadable = "raise"

    def __len__(self) -> int:
        return len(self.paths)

    def reading(self, on_error: Unreadable) -> "FolderImages":
        """Return a copy of the dataset with another rule for unreadable files.

        Args:
            on_error: "raise"; "replace" by the next readable file; "leave out" of the batch.
        """
        other = copy.copy(self)
        other._on_error = on_error
        return other

    def __getitem__(self, index: int) -> Sample | None:
        """Return the image ``(C, size, size)``, its label and its position, or None if it is left out.

        With ``resize="whole"`` the image of a training index is a `WholeImages` with the size ``(2,)``.

        Raises:
            RuntimeError: If the file cannot be read; the message names it.
        """
        for place in range(index, index + min(len(self), _MOST_IN_A_ROW)):
            position = place % len(self)
            try:
                value, label = self.fetch(position, getattr(index, "seed", None))
            except Exception as error:
                if self._on_error == "raise":
                    raise self._unreadable(position, error) from error
                self._note(position, error)
                if self._on_error == "leave out":
                    return None
                continue
            try:
                image = self.square(self.checked(value), getattr(index, "seed", None))
            except Exception as error:  # invalid output of the loader, not an unreadable file
                raise self._unreadable(position, error) from error
            return image, label, position
        tried, last = min(len(self), _MOST_IN_A_ROW), self.paths[position]
        raise RuntimeError(
            f"None of {tried} consecutive {self.what}s can be read, the last one is {last}. Check the folder."
        )

    def fetch(self, position: int, seed: int | None) -> tuple[Any, int]:
        """Return what `load` reads of the file at a position, and its label."""
        return self.load(self.paths[position], seed), self.labels[position]

    def load(self, path: str, seed: int | None) -> Any:
        """Read one file; ``seed`` is that of this file in this epoch, None in evaluation."""
        return self.loader(path)

    def checked(self, value: Any) -> Tensor:
        """Return what `load` returned as an image ``(C, H, W)``, uint8 or float32 in 0..1."""
        return as_image(value)

    def collate(self, samples: Sequence[Sample | None]) -> list[Any]:
        """Return the images ``(B, C, size, size)``, labels ``(B,)`` and, with ``indices``, positions ``(B,)``.

        Raises:
            RuntimeError: If all images were left out.
            ValueError: If images differ in channels or dtype; the message names two files.
        """
        found = [sample for sample in samples if sample is not None]
        if not found:
            raise RuntimeError(f"None of {len(samples)} {self.what}s of a batch can be read. {self.listed()}")
        first, _, position = found[0]
        for image, _, other in found:
            if image.shape != first.shape or image.dtype != first.dtype:
                raise ValueError(
                    f"All {self.what}s must have the same channels and type, got {_kind(first)} in "
                    f"{self.paths[position]} and {_kind(image)} in {self.paths[other]}. "
                    "Give a `loader` that converts them."
                )
        images, labels, positions = zip(*found, strict=True)
        batch: list[Any] = [stacked(images), torch.tensor(labels), torch.tensor(positions)]
        return batch if self.indices else batch[:2]

    def skipped(self) -> list[str]:
        """Return the paths of the files that could not be read so far."""
        return [self.paths[position] for position in self.unreadable.nonzero().flatten().tolist()]

    def listed(self, most: int = 3) -> str:
        """Return a sentence with the number of unreadable files and the first paths."""
        skipped = self.skipped()
        more = f" and {len(skipped) - most} more" if len(skipped) > most else ""
        return f"{len(skipped)} of {len(self)} {self.what}s could not be read: {', '.join(skipped[:most])}{more}."

    def _unreadable(self, position: int, error: Exception) -> RuntimeError:
        reason = str(error).rstrip(".")
        return RuntimeError(f"Cannot read the {self.what} {self.paths[position]}: {reason}. Repair or remove the file.")

    def _note(self, position: int, error: Exception) -> None:
        """Mark a file as unreadable and warn about the first one immediately."""
        is_first = not self.unreadable.any()
        self.unreadable[position] = True
        if is_first:
            what = f"Cannot read the {self.what} {self.paths[position]}: {error}"
            warnings.warn(f"{what} It is skipped, as are further ones, without another warning.", stacklevel=2)

    def square(self, image: Tensor, seed: int | None) -> Tensor:
        """Return the square ``(C, size, size)`` of an image, see `resized`; ``seed`` is that of `load`."""
        return resized(image, self.size, self.resize, seed)


def training_resize(resize: str, trainer: Any) -> str:
    """Return how training images become squares: "crop" instead of "whole" where nothing makes views of `WholeImages`.

    Args:
        resize: "whole", "crop", "center" or "squash".
        trainer: The Trainer of a data module, of which a callback may take `WholeImages`; None: somebody does.
    """
    callbacks = [] if trainer is None else trainer.callbacks
    taken = trainer is None or any(getattr(callback, "takes_whole_images", False) for callback in callbacks)
    return "crop" if resize == "whole" and not taken else resize


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Return a batch ``(B, C, size, size)`` of images ``(C, size, size)``, as `WholeImages` if they are.

    Args:
        images: Results of `resized`, all of one kind, shape and dtype.
    """
    pixels: Tensor = default_collate([image.as_subclass(Tensor) for image in images])
    sizes = [image.sizes for image in images if isinstance(image, WholeImages)]
    return WholeImages(pixels, np.stack(sizes)) if sizes else pixels


def resized(image: Tensor, size: int, resize: str, seed: int | None) -> Tensor:
    """Return an image as a square ``(C, size, size)``.

    Args:
        image: ``(C, H, W)``.
        size: Height and width, in pixels.
        resize: "whole", "crop", "center" or "squash".
        seed: Of a training image: "whole" then returns a `WholeImages` with the size ``(2,)``, and "crop" draws the
            place of the square along the longer side. None, and "center", cut the central square.
    """
    from torchvision.transforms.v2 import functional as F

    shape = [size, size]
    whole = resize == "whole" and seed is not None
    smaller: Tensor = F.resize(image, shape if whole or resize == "squash" else [size], antialias=True)
    if whole:
        return WholeImages(smaller, np.array(image.shape[-2:]))
    if resize == "crop" and seed is not None:
        top, left = (seed % (edge - size + 1) for edge in smaller.shape[-2:])
        smaller = smaller[..., top : top + size, left : left + size]
    square: Tensor = F.center_crop(smaller, shape)
    return square


def read_rgb(path: str | BinaryIO, *, exif: bool = True, formats: tuple[str, ...] | None = None) -> Tensor:
    """Read a file with Pillow as RGB, uint8 ``(3, H, W)``; of several frames the first, and without transparency.

    Args:
        path: The file, or its open binary stream.
        exif: Turn the image upright by its EXIF orientation.
        formats: Pillow's names of the formats that are tried; None for all.

    Raises:
        ValueError: If its pixels have more than 8 bits.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor

    with Image.open(path, formats=formats) as image:
        if image.mode[0] in "IF":  # Pillow would clip such values at 255
            raise ValueError(f"it has more than 8 bits (Pillow's mode {image.mode!r}); give a `loader` that scales it.")
        rgb = image.convert("RGB")
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1)) if exif else None  # after loading, which turns TIFFs
        pixels: Tensor = pil_to_tensor(rgb if turn is None else rgb.transpose(turn))
        return pixels


def as_image(value: Any) -> Tensor:
    """Convert the output of a loader to an image of the batch contract, ``(C, H, W)`` uint8 or float32 in 0..1."""
    image = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or 0 in image.shape:
        _refuse("be an image (C, H, W) or (H, W)", tuple(image.shape), "Put the channel dimension first")
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.uint16:
        return image.to(torch.float32) / 65535
    if not image.is_floating_point():
        _refuse("return uint8, uint16 or floats", image.dtype, "Scale the values to 0..1")
    if not bool(((image >= 0) & (image <= 1)).all()):
        _refuse("return floats in 0..1", (image.min().item(), image.max().item()), "Divide by the largest value")
    return image.to(torch.float32)


def _refuse(rule: str, value: object, hint: str) -> NoReturn:
    raise ValueError(f"`loader` must {rule}, got {value}. {hint}.")


def _kind(image: Tensor) -> str:
    return f"{image.dtype} {tuple(image.shape)}"
