"""Folders of images: decoded and brought to one size in workers, views made on the device."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.data._folder_images import FolderImages, Loader
from lightning_contrast.data._position import RemembersPosition
from lightning_contrast.data.loading import ResumableLoader, check_loading, make_loader

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolderDataModule(RemembersPosition, L.LightningDataModule):
    """Serves folders of images.

    ``train_dir/<class>/...`` gives the labels; a folder that holds images and no class folders has none, and its
    labels are -1. Workers decode each image and bring it to ``size``; everything random belongs to `ViewAugmentation`,
    on the device. Batches are ``(images, labels)``: ``(B, C, size, size)``, uint8 (or float in 0..1, see ``loader``)
    and int64 ``(B,)``; ``indices=True`` adds the position in `paths`, int64 ``(B,)``.

    The order is a function of (seed, epoch), each rank has its share, and a run can be resumed in mid-epoch. An image
    that cannot be read stops the run with its path, unless ``on_error="skip"``.

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
        on_error: What is done about a file that cannot be read. "raise": the run ends with its path. "skip": in
            training the next image that can be read takes its place, with its own label and position, so that batches
            keep their size and resume stays exact; in validation it is left out; a prediction, which has a row for each
            of `paths`, ends all the same. The first one is told at once, all are counted at the end of the run and
            listed in `skipped`; a hundred in a row end the run.
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
        on_error: Literal["raise", "skip"] = "raise",
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
        check_choice("on_error", on_error, ("raise", "skip"))
        self.dirs = {"train": Path(train_dir)} | ({"val": Path(val_dir)} if val_dir is not None else {})
        self.size, self.resize, self.loader, self.on_error = size, resize, loader, on_error
        self.extensions = tuple(extensions) if extensions is not None else (EXTENSIONS if loader is None else ("",))
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.indices, self.pin_memory = indices, pin_memory
        self.class_names: tuple[str, ...] = ()
        self._sets: dict[str, FolderImages] = {}
        self._told = 0
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

    @property
    def skipped(self) -> list[str]:
        """The files of both folders that this process (with its workers) could not read so far."""
        return [path for images in self._sets.values() for path in images.skipped()]

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
            hint = "Name the class folders alike"
            require(not extra, "val_dir", "have no class that `train_dir` has not", extra, hint)
            numbers = {name: number for number, name in enumerate(self.class_names)}
            labels = [numbers[name] if name is not None else -1 for _, name in files]
            paths = [path for path, _ in files]
            self._sets[split] = FolderImages(paths, labels, self.size, self.resize, self.loader, indices=self.indices)

    def teardown(self, stage: str | None = None) -> None:
        """Tell how many images were skipped.

        Args:
            stage: Taken for Lightning's sake.
        """
        if len(self.skipped) > self._told:
            self._told = len(self.skipped)
            told = [f"{split}: {images.listed()}" for split, images in self._sets.items() if images.skipped()]
            warnings.warn(f"Images were skipped. {' '.join(told)}", stacklevel=2)

    def on_exception(self, exception: BaseException) -> None:
        """Tell how many images were skipped, in a run that fails too.

        Args:
            exception: Taken for Lightning's sake.
        """
        self.teardown()

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches of the training folder, with exact resume in mid-epoch."""
        return self._remember(self._loader("train", train=True))

    def val_dataloader(self) -> ResumableLoader:
        """Return the validation folder in order."""
        return self._loader("val", train=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the validation folder, or the training folder where there is none, in the order of `paths`."""
        # An ordinary sampler: for prediction Lightning shares it out without repeating rows.
        dataset = self._set("val" if "val" in self.dirs else "train")  # refuses what cannot be read
        return DataLoader(dataset, batch_size=self.batch_size, generator=torch.Generator(), **self._how(dataset))

    def _set(self, split: str) -> FolderImages:
        check_choice("split", split, self.dirs)
        self.setup()
        return self._sets[split]

    def _loader(self, split: str, *, train: bool) -> ResumableLoader:
        dataset = self._set(split)
        if self.on_error == "skip":
            dataset = dataset.reading("replace" if train else "leave out")
        return make_loader(
            dataset,
            self.batch_size,
            trainer=self.trainer,
            train=train,
            seed=self.seed,
            **self._how(dataset),
        )

    def _how(self, dataset: FolderImages) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "collate_fn": dataset.collate, "pin_memory": self.pin_memory}


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
        hint = f"Files that count end in {ends}; set `extensions` for others"
        require(bool(loose), argument, "hold images, or class folders with images", str(folder), hint)
        return [(path, None) for path in loose], ()
    if loose:
        hint = f"Move images like {loose[0]} into class folders, or take the folders away"
        fail(argument, "hold class folders or images, not both", str(folder), hint)
    files: list[tuple[str, str | None]] = []
    for name in classes:
        inside = _files(folder / name, extensions, deep=True)
        hint = f"Remove empty class folders; files that count end in {ends}"
        require(bool(inside), argument, "hold images in every class folder", str(folder / name), hint)
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
