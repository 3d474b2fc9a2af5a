"""Data module for image folders, decoded and resized by worker processes."""

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.data._folder_files import FileId, find_images
from lightning_contrast.data._folder_images import FolderImages, Loader, read_rgb, training_resize
from lightning_contrast.data._position import RemembersPosition
from lightning_contrast.data.loading import BatchOrder, ResumableLoader, check_loading, make_loader
from lightning_contrast.data.structured_batches import StructuredBatches

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolderDataModule(RemembersPosition, L.LightningDataModule):
    """Data module for folders of images.

    Labels are given by ``train_dir/<class>/...``; they are -1 for a folder of images without class folders. Workers
    decode each image, turn it upright and resize it to ``size``; random augmentation is done by `ViewAugmentation` on
    the device. Hidden files and folders, whose names begin with a dot, are left out, and an image to which several
    links lead counts once.

    Batches are ``(images, labels)``: ``(B, C, size, size)``, uint8 (or float in 0..1, see ``loader``), in training an
    `augment.WholeImages` (see ``resize``), and int64 ``(B,)``; ``indices=True`` adds the position in
    `paths`, int64 ``(B,)``.

    The order is a function of (seed, epoch), the images are split between ranks, and runs resume exactly within an
    epoch. An unreadable image raises an error with its path, unless ``on_error="skip"``.

    Args:
        train_dir: Folder of the training images.
        val_dir: Folder of the validation images, or None; its classes must be among the training classes.
        size: Height and width of the images, in pixels, >= 1. Use more than the size of the views, for detail in crops.
        batch_size: Images per batch on each rank, >= 1. In training a short last batch is dropped.
        num_workers: Worker processes on each rank, >= 0.
        resize: How an image becomes a square, which keeps batches rectangular. "whole", "crop" and "center" resize the
            shorter side to ``size`` and cut the central square in evaluation and in the feature bank of a k-NN probe;
            they differ in training. "whole" resizes both sides and yields `augment.WholeImages`, which remembers the
            shape of each image: `ViewAugmentation` cuts each view from the whole image, with the areas and aspect
            ratios that torchvision's ``RandomResizedCrop`` draws of the file, to the pixel of the square; a Trainer
            without `ViewAugmentation` gets "crop" instead. "crop" yields tensors: a square at a place along the longer
            side that is drawn for each image and epoch; all views of a step come from it. "center" yields the central
            square: views never show the sides. "squash" resizes both sides, also in evaluation: each view is cut from
            the whole image, and the aspect ratios of the crops scale with the image's, as in SimCLR's reference
            implementation.
        loader: Function that reads one file, for formats without Pillow support: ``loader(path)`` returns a tensor or
            array ``(C, H, W)`` or ``(H, W)`` with any number of channels. uint8 is kept, uint16 is divided by 65535,
            floats must lie in 0..1. It must not draw random numbers, for exact resume.
        exif: Turn photographs upright by their EXIF orientation, as viewers do. False leaves the pixels as they are
            stored (Pillow turns TIFF files in any case). A ``loader`` decides for itself.
        on_error: Handling of unreadable files. "raise" raises an error with the path. "skip" replaces the image in
            training by the next readable one, with its own label and position, so that batches keep their size and
            resume stays exact; in validation the image is left out; prediction, which has one row for each of `paths`,
            still raises. The first skipped file causes a warning, all are counted at the end of the run and listed in
            `skipped`; 100 consecutive ones raise an error.
        extensions: File extensions in lower case. None: common formats of Pillow, or every file with a ``loader``.
        seed: Seed of the order and of the workers, >= 0.
        indices: Also yield the positions.
        pin_memory: Copy batches to page-locked memory, for faster transfer to an accelerator.
        batches: Near neighbors in each training batch, see `StructuredBatches`; None shuffles all images.

    Raises:
        ValueError: If a value is out of range; in `setup`, if a folder has no images.
        FileNotFoundError: In `setup`, if a folder is missing.
    """

    what: ClassVar[str] = "images"

    def __init__(
        self,
        train_dir: str | Path,
        val_dir: str | Path | None = None,
        *,
        size: int = 256,
        batch_size: int = 256,
        num_workers: int = 4,
        resize: Literal["whole", "crop", "center", "squash"] = "whole",
        loader: Loader | None = None,
        exif: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
        extensions: Sequence[str] | None = None,
        seed: int = 0,
        indices: bool = False,
        pin_memory: bool = False,
        batches: StructuredBatches | None = None,
    ) -> None:
        super().__init__()
        check_loading(batch_size, seed)
        check_at_least("size", size, 1)
        check_at_least("num_workers", num_workers, 0)
        check_choice("resize", resize, ("whole", "crop", "center", "squash"))
        check_choice("on_error", on_error, ("raise", "skip"))
        self.dirs: dict[str, Any] = {"train": train_dir} | ({"val": val_dir} if val_dir is not None else {})
        self.size, self.resize, self.on_error = size, resize, on_error
        self.loader = partial(read_rgb, exif=exif) if loader is None else loader
        self.extensions = tuple(extensions) if extensions is not None else (EXTENSIONS if loader is None else ("",))
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.indices, self.pin_memory, self.batches = indices, pin_memory, batches
        self.class_names: tuple[str, ...] = ()
        self._sets: dict[str, FolderImages] = {}
        self._reported = 0
        if val_dir is None:  # Lightning skips validation if this hook is not overridden
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @property
    def num_classes(self) -> int:
        """The number of class folders, available after `setup`; 0 if there are none."""
        return len(self.class_names)

    def paths(self, split: str = "train") -> list[str]:
        """Return the files of a split; the positions of ``indices`` refer to this list.

        Args:
            split: "train" or "val".
        """
        return list(self._set(split).paths)

    @property
    def skipped(self) -> list[str]:
        """Files of both folders that this process and its workers could not read so far."""
        return [path for images in self._sets.values() for path in images.skipped()]

    def setup(self, stage: str | None = None) -> None:
        """List the folders; a second call does nothing.

        Args:
            stage: Not used; both folders are listed in every stage.
        """
        if self._sets:
            return
        found = {
            split: list_images("train_dir" if split == "train" else "val_dir", Path(folder), self.extensions, self.what)
            for split, folder in self.dirs.items()
        }
        self.class_names = found["train"][1] or found.get("val", ([], ()))[1]
        shared = found["train"][0].keys() & found.get("val", ({}, ()))[0].keys()
        if shared:
            warnings.warn(
                f"{len(shared)} validation {self.what} are training {self.what} too, so that validation scores are "
                "too high.",
                stacklevel=2,
            )
        for split, (files, classes) in found.items():
            extra = sorted(set(classes) - set(self.class_names))
            hint = "Use the same class folders in both"
            require(not extra, "val_dir", "have no class that `train_dir` lacks", extra, hint)
            numbers = {name: number for number, name in enumerate(self.class_names)}
            labels = [numbers[name] if name is not None else -1 for _, name in files.values()]
            paths = [path for path, _ in files.values()]
            self._sets[split] = self.make_set(paths, labels)

    def make_set(self, paths: list[str], labels: list[int]) -> FolderImages:
        """Return the dataset of these files and their classes."""
        return FolderImages(paths, labels, self.size, self.resize, self.loader, indices=self.indices)

    def teardown(self, stage: str | None = None) -> None:
        """Warn about the number of skipped images.

        Args:
            stage: Not used.
        """
        if len(self.skipped) > self._reported:
            self._reported = len(self.skipped)
            counts = [f"{split}: {images.listed()}" for split, images in self._sets.items() if images.skipped()]
            warnings.warn(f"{self.what.capitalize()} were skipped. {' '.join(counts)}", stacklevel=2)

    def on_exception(self, exception: BaseException) -> None:
        """Warn about the number of skipped images when a run fails.

        Args:
            exception: Not used.
        """
        self.teardown()

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches of the training folder, with exact resume within an epoch."""
        return self._remember(self._loader("train", train=True))

    def val_dataloader(self) -> ResumableLoader:
        """Return the validation folder in order."""
        return self._loader("val", train=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the validation folder, or the training folder if there is none, in the order of `paths`."""
        # Lightning splits a sequential sampler between ranks for prediction without repeating rows.
        dataset = self._set("val" if "val" in self.dirs else "train")  # raises for unreadable files
        return DataLoader(dataset, batch_size=self.batch_size, generator=torch.Generator(), **self._options(dataset))

    def training_order(self, dataset: FolderImages) -> BatchOrder | None:
        """Return the order of the training images; None shuffles all of them."""
        return self.batches

    def _set(self, split: str) -> FolderImages:
        check_choice("split", split, self.dirs)
        self.setup()
        return self._sets[split]

    def _loader(self, split: str, *, train: bool) -> ResumableLoader:
        dataset = self._set(split)
        if train:
            dataset = copy.copy(dataset)
            dataset.resize = training_resize(self.resize, self.trainer)
        if self.on_error == "skip":
            dataset = dataset.reading("replace" if train else "leave out")
        return make_loader(
            dataset,
            self.batch_size,
            trainer=self.trainer,
            train=train,
            seed=self.seed,
            batches=self.training_order(dataset) if train else None,
            **self._options(dataset),
        )

    def _options(self, dataset: FolderImages) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "collate_fn": dataset.collate, "pin_memory": self.pin_memory}


def list_images(
    argument: str, folder: Path, extensions: tuple[str, ...], what: str
) -> tuple[dict[FileId, tuple[str, str | None]], tuple[str, ...]]:
    """Return the sorted files ``what`` of a folder, each with the name of its class or None, and the class names."""
    if not folder.is_dir():
        fail(argument, "be an existing folder", str(folder), f"Set it to the folder of your {what}", FileNotFoundError)
    loose = find_images(folder, extensions, deep=False)
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    ends = ", ".join(extensions) or "any"
    if not classes:
        hint = f"Expected extensions are {ends}; set `extensions` for others"
        require(bool(loose), argument, f"hold {what}, or class folders with {what}", str(folder), hint)
        return {file_id: (path, None) for file_id, path in loose.items()}, ()
    if loose:
        hint = f"Move {what} like {next(iter(loose.values()))} into class folders, or remove the folders"
        fail(argument, f"hold class folders or {what}, not both", str(folder), hint)
    files: dict[FileId, tuple[str, str | None]] = {}
    for name in classes:
        inside = find_images(folder / name, extensions, deep=True)
        hint = f"Remove empty class folders; expected extensions are {ends}"
        require(bool(inside), argument, f"hold {what} in every class folder", str(folder / name), hint)
        for file_id, path in inside.items():
            if file_id in files:
                hint = "Links put it into two classes; remove one of them"
                fail(argument, f"hold each {what.removesuffix('s')} in one class", [files[file_id][0], path], hint)
            files[file_id] = (path, name)
    return files, tuple(classes)
