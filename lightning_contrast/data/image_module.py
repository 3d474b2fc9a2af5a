"""Small public datasets of torchvision, held in memory."""

import dataclasses
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.data.in_memory import InMemoryDataModule, Split
from lightning_contrast.data.structured_batches import StructuredBatches


@dataclasses.dataclass(frozen=True)
class _Source:
    """Properties of a dataset that are known before it is read."""

    files: str  # location under `root` used by torchvision
    num_classes: int = 10
    gray: bool = False
    idx: bool = False  # the four files of MNIST's format
    named_parts: bool = False  # torchvision uses `split="train"` instead of `train=True`
    train_splits: tuple[str, ...] = ("train",)


_SOURCES = {
    "CIFAR10": _Source("cifar-10-batches-py/"),
    "CIFAR100": _Source("cifar-100-python/", num_classes=100),
    "FashionMNIST": _Source("FashionMNIST/raw/", gray=True, idx=True),
    "KMNIST": _Source("KMNIST/raw/", gray=True, idx=True),
    "MNIST": _Source("MNIST/raw/", gray=True, idx=True),
    "STL10": _Source("stl10_binary/", named_parts=True, train_splits=("train", "unlabeled", "train+unlabeled")),
    "SVHN": _Source("train_32x32.mat and test_32x32.mat", named_parts=True, train_splits=("train", "extra")),
    "USPS": _Source("usps.bz2 and usps.t.bz2", gray=True),
}
_HINTS = {
    "FashionMNIST": "; or use the folder of Debian's package dataset-fashion-mnist, /usr/share/datasets/fashion-mnist"
}


class ImageDataModule(InMemoryDataModule):
    """A public dataset of small images, read by torchvision and held in memory as uint8.

    Batches are ``(images, labels)``: uint8 ``(B, C, H, W)`` and int64 ``(B,)``; ``indices=True`` adds the position in
    the split, int64 ``(B,)``. Images without a label (STL10's unlabeled split) carry -1. `val_dataloader` yields the
    test images, unless ``validation_size`` holds out training images for tuning.

    Args:
        dataset: "CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "STL10", "SVHN" or "USPS".
        root: Folder that torchvision reads from and downloads to. The files of MNIST, KMNIST and FashionMNIST may also
            be directly in it, compressed (``.gz``) or not.
        download: Download missing files (in one process per machine).
        batch_size: Images per batch on each rank, >= 1. In training a short last batch is dropped.
        channels: None keeps the channels of the dataset; 3 repeats a grayscale image to three channels.
        train_split: Training split: "train"; "unlabeled" or "train+unlabeled" of STL10; "extra" of SVHN.
        validation_size: Number of training images held out for validation, the same for all seeds; 0 validates on the
            test images.
        seed: Seed of the training order, which is a function of (seed, epoch), >= 0.
        indices: Also yield the positions.
        pin_memory: Copy batches to page-locked memory, for faster transfer to an accelerator.
        batches: Near neighbors in each training batch, see `StructuredBatches`; None shuffles all images.

    Raises:
        ValueError: If a value is out of range, or the dataset is unknown.
        FileNotFoundError: In `setup`, if the dataset is not in ``root``.
    """

    def __init__(
        self,
        dataset: str,
        root: str | Path,
        *,
        download: bool = False,
        batch_size: int = 256,
        channels: int | None = None,
        train_split: str = "train",
        validation_size: int = 0,
        seed: int = 0,
        indices: bool = False,
        pin_memory: bool = False,
        batches: StructuredBatches | None = None,
    ) -> None:
        super().__init__(batch_size, seed=seed, indices=indices, pin_memory=pin_memory, batches=batches)
        check_choice("dataset", dataset, _SOURCES)
        self.dataset_name, self.root, self.download = dataset, Path(root), download
        self._source = _SOURCES[dataset]
        native = 1 if self._source.gray else 3
        choices = "None, 1 or 3" if self._source.gray else "None or 3"
        hint = "3 repeats a grayscale image; an augmentation converts color to grayscale"
        require(channels in {None, native, 3}, "channels", f"be {choices} for {dataset}", channels, hint)
        self.channels = channels or native
        check_choice("train_split", train_split, self._source.train_splits)
        self.train_split = train_split
        check_at_least("validation_size", validation_size, 0)
        hint = "Validate on the test images, or train on labeled ones"
        labeled = validation_size == 0 or "unlabeled" not in train_split
        require(labeled, "validation_size", f"be 0 if `train_split` is {train_split!r}", validation_size, hint)
        self.validation_size = validation_size
        self.num_classes = self._source.num_classes
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare_data(self) -> None:
        """Download missing files with ``download=True``; Lightning calls this in one process per machine."""
        if not self.download:
            return
        for part in (self.train_split, "test"):
            if not (self._source.idx and self._idx_files(part)):
                self._torchvision(part, download=True)

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the images of a split, ``(N, C, H, W)`` uint8, and its labels ``(N,)`` int64.

        Args:
            split: "train", "val" or "test".

        Raises:
            FileNotFoundError: If the dataset is not in ``root``.
            ValueError: If ``validation_size`` leaves no training images.
        """
        if split == "test" or (split == "val" and self.validation_size == 0):
            return self._part("test")
        images, labels = self._part(self.train_split)
        hint = "Hold out fewer"
        fits = self.validation_size < len(images)
        require(fits, "validation_size", f"be < {len(images)}, the training images", self.validation_size, hint)
        rows = slice(None, self.validation_size) if split == "val" else slice(self.validation_size, None)
        return images[rows], labels[rows]

    def _part(self, part: str) -> tuple[Tensor, Tensor]:
        """Return a part of the dataset, read once; channels are repeated without a copy."""
        if part not in self._parts:
            files = self._idx_files(part) if self._source.idx else None
            if files is not None:
                images, labels = _read_idx(files[0], dims=3), _read_idx(files[1], dims=1).long()
            else:
                images, labels = _as_tensors(self._torchvision(part, download=False))
            if images.ndim == 3:
                images = images[:, None]
            if part == self.train_split and self.validation_size > 0:  # both splits are slices, without a copy
                order = torch.randperm(
                    len(images), generator=torch.Generator().manual_seed(0)
                )  # the same for all seeds
                images, labels = images[order], labels[order]
            self._parts[part] = images.expand(-1, self.channels, -1, -1), labels
        return self._parts[part]

    def _torchvision(self, part: str, *, download: bool) -> Any:
        from torchvision import datasets

        chosen: dict[str, Any] = {"split": part} if self._source.named_parts else {"train": part != "test"}
        try:
            return getattr(datasets, self.dataset_name)(str(self.root), download=download, **chosen)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{self.dataset_name} is read with {error.name}: pip install {error.name}."
            ) from error
        except (RuntimeError, FileNotFoundError) as error:
            if download:
                raise  # the error of the download
            where = f"hold all of {self.dataset_name} in the layout of torchvision ({self._source.files})"
            hint = f"Set `download=True`, or set `root` to its folder{_HINTS.get(self.dataset_name, '')}"
            raise FileNotFoundError(f"`root` must {where}, got {str(self.root)!r}. {hint}.") from error

    def _idx_files(self, part: str) -> tuple[Path, Path] | None:
        """Return the files of a part in MNIST's format, or None if they do not exist."""
        prefix = "t10k" if part == "test" else "train"
        for folder in (self.root, self.root / self._source.files):
            for ending in ("", ".gz"):
                images = folder / f"{prefix}-images-idx3-ubyte{ending}"
                labels = folder / f"{prefix}-labels-idx1-ubyte{ending}"
                if images.is_file() and labels.is_file():
                    return images, labels
        return None


def _read_idx(path: Path, dims: int) -> Tensor:
    """Read a file in MNIST's format (http://yann.lecun.com/exdb/mnist): uint8 with ``dims`` dimensions."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"Cannot unpack {path}: {error}. Download it again.") from error
    shape = np.frombuffer(data[4 : 4 + 4 * dims], dtype=">u4").astype(int)
    body = data[4 + 4 * dims :]
    if data[:4] != bytes([0, 0, 8, dims]) or len(shape) != dims or len(body) != int(np.prod(shape)):
        fail("root", f"hold complete files in MNIST's format with {dims} dimensions", str(path), "Download it again")
    return torch.from_numpy(np.frombuffer(body, dtype=np.uint8).copy()).reshape(shape.tolist())


def _as_tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 ``(N, C, H, W)`` or ``(N, H, W)``, and the labels ``(N,)`` of a torchvision dataset."""
    images = torch.as_tensor(dataset.data)
    labels = torch.as_tensor(dataset.targets if hasattr(dataset, "targets") else dataset.labels).long()
    if images.ndim == 4 and images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, labels
