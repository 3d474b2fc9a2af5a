"""Folders of images: decoded and brought to one size in workers, views made on the device."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.data._position import RemembersPosition
from lightning_contrast.data.loading import ResumableLoader, check_loading, make_loader

Loader = Callable[[str], Any]
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolderDataModule(RemembersPosition, L.LightningDataModule):
    """Serves folders of images.

    ``train_dir/<class>/...`` gives the labels; a folder that holds images and no class folders has none, and its
    labels are -1. Workers decode each image and bring it to ``size``; everything random belongs to `ViewAugmentation`,
    on the device. Batches are ``(images, labels)``: ``(B, C, size, size)``, uint8 (or float in 0..1, see ``loader``)
    and int64 ``(B,)``; ``indices=True`` adds the position in `paths`, int64 ``(B,)``.

    The order is a function of (seed, epoch), each rank has its share, and a run can be resumed in mid-epoch. An image
    that cannot be read stops the run with its path: nothing is skipped.

    Args:
        train_dir: Folder of the training images.
        val_dir: Folder of the validation images, if there are any; its classes must be among the training classes.
        size: Height and width of what is yielded, in pixels, >= 1. Larger than the views, so that crops have detail.
        batch_size: Images per batch on each rank, >= 1. In training a short last batch is left out.
        num_workers: Processes that decode, on each rank, >= 0.
        resize: "crop": the shorter side to ``size``, then the centre. "squash": both sides to ``size``.
        loader: Reads one file where Pillow does not do: ``loader(path)`` returns a tensor or array ``(C, H, W)`` or
            ``(H, W)``: uint8 stays so, uint16 is divided by 65535, floats must lie in 0..1. Any number of channels.
            It must not draw random numbers if a run is to be resumed exactly.
        extensions: Endings of the files that count, in lower case. None: Pillow's usual ones; every file where a
            ``loader`` is given.
        seed: Seed of the order and of the workers, >= 0.
        indices: Yield the positions too.
        pin_memory: Put batches in page-locked memory, for faster copies to an accelerator.

    Raises:
        ValueError: If a value lies out of its range; in `setup`, if a folder holds no images.
        FileNotFoundError: In `setup`, if a folder is missing.
    """

    def __init__(
        self,
        train_dir: str | Path,
        val_dir: str | Path | None = None,
        *,
        size: int = 256,
        batch_size: int = 256,
        num_workers: int = 4,
        resize: Literal["crop", "squash"] = "crop",
        loader: Loader | None = None,
        extensions: Sequence[str] | None = None,
        seed: int = 0,
        indices: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        check_loading(batch_size, seed)
        check_at_least("size", size, 1)
        check_at_least("num_workers", num_workers, 0)
        check_choice("resize", resize, ("crop", "squash"))
        self.dirs = {"train": Path(train_dir)} | ({"val": Path(val_dir)} if val_dir is not None else {})
        self.size, self.resize, self.loader = size, resize, loader
        self.extensions = tuple(extensions) if extensions is not None else (EXTENSIONS if loader is None else ("",))
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.indices, self.pin_memory = indices, pin_memory
        self.class_names: tuple[str, ...] = ()
        self._sets: dict[str, FolderImages] = {}
        if val_dir is None:  # a module without this hook is one that Lightning does not validate on
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @property
    def num_classes(self) -> int:
        """The number of class folders, known after `setup`; 0 where there are none."""
        return len(self.class_names)

    def paths(self, split: str = "train") -> list[str]:
        """Return the files of a split, in the order that ``indices`` count.

        Args:
            split: "train" or "val".
        """
        return list(self._set(split).paths)

    def setup(self, stage: str | None = None) -> None:
        """List the folders; a second call does nothing.

        Args:
            stage: Taken for Lightning's sake; both folders are listed in every stage.
        """
        if self._sets:
            return
        found = {
            split: _list_images("train_dir" if split == "train" else "val_dir", folder, self.extensions)
            for split, folder in self.dirs.items()
        }
        self.class_names = found["train"][1] or found.get("val", ([], ()))[1]
        for split, (files, classes) in found.items():
            extra = sorted(set(classes) - set(self.class_names))
            mend = "Name the class folders alike"
            require(not extra, "val_dir", "have no class that `train_dir` has not", extra, mend)
            numbers = {name: number for number, name in enumerate(self.class_names)}
            labels = [numbers[name] if name is not None else -1 for _, name in files]
            paths = [path for path, _ in files]
            self._sets[split] = FolderImages(paths, labels, self.size, self.resize, self.loader, indices=self.indices)

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches of the training folder, with exact resume in mid-epoch."""
        return self._remember(self._loader("train", train=True))

    def val_dataloader(self) -> ResumableLoader:
        """Return the validation folder in order."""
        return self._loader("val", train=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the validation folder, or the training folder where there is none, in the order of `paths`."""
        # An ordinary sampler: for prediction Lightning shares it out without repeating rows.
        dataset = self._set("val" if "val" in self.dirs else "train")
        return DataLoader(dataset, batch_size=self.batch_size, generator=torch.Generator(), **self._how(dataset))

    def _set(self, split: str) -> "FolderImages":
        check_choice("split", split, self.dirs)
        self.setup()
        return self._sets[split]

    def _loader(self, split: str, *, train: bool) -> ResumableLoader:
        dataset = self._set(split)
        return make_loader(
            dataset,
            self.batch_size,
            trainer=self.trainer,
            train=train,
            seed=self.seed,
            **self._how(dataset),
        )

    def _how(self, dataset: "FolderImages") -> dict[str, Any]:
        return {"num_workers": self.num_workers, "collate_fn": dataset.collate, "pin_memory": self.pin_memory}


class FolderImages(Dataset[tuple[Tensor, int, int]]):
    """Image files, decoded and brought to one size as they are asked for.

    Args:
        paths: The files.
        labels: Class number of each, -1 for none.
        size: Height and width, in pixels.
        resize: "crop" or "squash".
        loader: Reads one file; None: Pillow, as RGB.
        indices: Whether batches hold the positions.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        size: int,
        resize: str,
        loader: Loader | None,
        *,
        indices: bool = False,
    ) -> None:
        self.paths, self.labels, self.size, self.resize = paths, labels, size, resize
        self.loader, self.indices = loader or read_rgb, indices

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """Return the image ``(C, size, size)``, its label and its position.

        Raises:
            RuntimeError: If the file cannot be read; the message names it.
        """
        path = self.paths[index]
        try:
            image = self._resized(_as_image(self.loader(path)))
        except Exception as error:
            raise RuntimeError(f"Cannot read the image {path}: {error} Mend or remove the file.") from error
        return image, self.labels[index], index

    def collate(self, samples: Sequence[tuple[Tensor, int, int]]) -> list[Tensor]:
        """Return the images ``(B, C, size, size)``, labels ``(B,)`` and, where asked for, indices ``(B,)``.

        Raises:
            ValueError: If images differ in channels or type; the message names two files.
        """
        first, _, position = samples[0]
        for image, _, other in samples:
            if image.shape != first.shape or image.dtype != first.dtype:
                raise ValueError(
                    f"All images must have the same channels and type, got {_kind(first)} in {self.paths[position]} "
                    f"and {_kind(image)} in {self.paths[other]}. Give a `loader` that makes them alike."
                )
        batch: list[Tensor] = default_collate(list(samples))
        return batch if self.indices else batch[:2]

    def _resized(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional as F

        shape = [self.size, self.size]
        resized: Tensor = F.resize(image, shape if self.resize == "squash" else [self.size], antialias=True)
        return resized if self.resize == "squash" else F.center_crop(resized, shape)


def read_rgb(path: str) -> Tensor:
    """Read a file with Pillow as RGB, uint8 ``(3, H, W)``.

    Args:
        path: The file.

    Raises:
        ValueError: If its pixels have more than 8 bits.
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    with Image.open(path) as image:
        if image.mode[0] in "IF":  # Pillow would cut such values off at 255
            raise ValueError(f"it has more than 8 bits (Pillow's mode {image.mode!r}); give a `loader` that scales it.")
        pixels: Tensor = pil_to_tensor(image.convert("RGB"))
        return pixels


def _as_image(value: Any) -> Tensor:
    """Return what a loader gave as an image of the batch contract, ``(C, H, W)`` uint8 or float32 in 0..1."""
    image = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or 0 in image.shape:
        _refuse("be an image (C, H, W) or (H, W)", tuple(image.shape), "Put the channels first")
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.uint16:
        return image.to(torch.float32) / 65535
    if not image.is_floating_point():
        _refuse("return uint8, uint16 or floats", image.dtype, "Scale the values to 0..1")
    if not bool(((image >= 0) & (image <= 1)).all()):
        _refuse("return floats in 0..1", (image.min().item(), image.max().item()), "Divide by the largest value")
    return image.to(torch.float32)


def _refuse(rule: str, value: object, mend: str) -> NoReturn:
    raise ValueError(f"`loader` must {rule}, got {value}. {mend}.")


def _kind(image: Tensor) -> str:
    return f"{image.dtype} {tuple(image.shape)}"


def _list_images(
    argument: str, folder: Path, extensions: tuple[str, ...]
) -> tuple[list[tuple[str, str | None]], tuple[str, ...]]:
    """Return the sorted files of a folder, each with the name of its class or None, and the class names."""
    if not folder.is_dir():
        fail(argument, "be an existing folder", str(folder), "Set it to the folder of your images", FileNotFoundError)
    loose = _files(folder, extensions, deep=False)
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    ends = ", ".join(extensions) or "any"
    if not classes:
        mend = f"Files that count end in {ends}; set `extensions` for others"
        require(bool(loose), argument, "hold images, or class folders with images", str(folder), mend)
        return [(path, None) for path in loose], ()
    if loose:
        mend = f"Move images like {loose[0]} into class folders, or take the folders away"
        fail(argument, "hold class folders or images, not both", str(folder), mend)
    files: list[tuple[str, str | None]] = []
    for name in classes:
        inside = _files(folder / name, extensions, deep=True)
        mend = f"Remove empty class folders; files that count end in {ends}"
        require(bool(inside), argument, "hold images in every class folder", str(folder / name), mend)
        files += [(path, name) for path in inside]
    return files, tuple(classes)


def _files(folder: Path, extensions: tuple[str, ...], *, deep: bool) -> list[str]:
    found = []
    for base, _, names in os.walk(folder, followlinks=True):
        found += [
            os.path.join(base, name) for name in names if not name.startswith(".") and name.lower().endswith(extensions)
        ]
        if not deep:
            break
    return sorted(found)
