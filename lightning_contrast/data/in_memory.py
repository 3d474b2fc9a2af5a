"""The base of data modules whose images fit in memory as uint8."""

import warnings
from abc import abstractmethod
from typing import Literal, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_contrast._checks import check_choice
from lightning_contrast.data._position import RemembersPosition
from lightning_contrast.data.loading import MemoryImages, ResumableLoader, as_is, check_loading, make_loader

Split = Literal["train", "val", "test"]
SPLITS = ("train", "val", "test")


class InMemoryDataModule(RemembersPosition, L.LightningDataModule):
    """Serves splits of uint8 images from memory, without workers and without Python per image.

    A subclass says in `read` how to get the splits; each is read once and kept. Batches are ``(images, labels)``:
    uint8 ``(B, C, H, W)`` and int64 ``(B,)``; ``indices=True`` adds the position in the split, int64 ``(B,)``.

    Args:
        batch_size: Images per batch on each rank, >= 1. In training a short last batch is left out.
        seed: Seed of the training order, which is a function of (seed, epoch), >= 0.
        indices: Yield the positions too.
        pin_memory: Put batches in page-locked memory, for faster copies to an accelerator.
    """

    def __init__(
        self, batch_size: int = 256, *, seed: int = 0, indices: bool = False, pin_memory: bool = False
    ) -> None:
        super().__init__()
        check_loading(batch_size, seed)
        self.batch_size, self.seed, self.indices, self.pin_memory = batch_size, seed, indices, pin_memory
        self._splits: dict[str, MemoryImages] = {}

    @abstractmethod
    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the images ``(N, C, H, W)`` uint8 and the labels ``(N,)`` int64 of a split."""

    def dataset(self, split: Split) -> MemoryImages:
        """Return a split as a set, read at the first call.

        Args:
            split: "train", "val" or "test".
        """
        check_choice("split", split, SPLITS)
        if split not in self._splits:
            self._splits[split] = MemoryImages(*self.read(split), indices=self.indices)
        return self._splits[split]

    def images(self, split: Split = "train") -> Tensor:
        """Return all images of a split, uint8 ``(N, C, H, W)``."""
        return self.dataset(split).images

    def labels(self, split: Split = "train") -> Tensor:
        """Return all labels of a split, int64 ``(N,)``."""
        return self.dataset(split).labels

    def setup(self, stage: str | None = None) -> None:
        """Read what ``stage`` needs; a second call reads nothing again.

        Args:
            stage: "fit", "validate", "test", "predict", or None for all.
        """
        # Lightning advises workers for every loader that has none; here they would only make it slower.
        warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
        wanted: dict[str | None, tuple[str, ...]] = {"fit": ("train", "val"), "validate": ("val",), None: SPLITS}
        for split in wanted.get(stage, ("test",)):
            self.dataset(cast("Split", split))

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches of the training split, with exact resume in mid-epoch."""
        return self._remember(self._loader("train", train=True))

    def val_dataloader(self) -> ResumableLoader:
        """Return the validation split in order."""
        return self._loader("val")

    def test_dataloader(self) -> ResumableLoader:
        """Return the test split in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test split in order, each image once on whatever number of ranks."""
        # An ordinary sampler: for prediction Lightning shares it out without repeating rows.
        dataset = self.dataset("test")
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            collate_fn=as_is,
            generator=torch.Generator(),
            pin_memory=self.pin_memory,
        )

    def _loader(self, split: Split, *, train: bool = False) -> ResumableLoader:
        return make_loader(
            self.dataset(split),
            self.batch_size,
            trainer=self.trainer,
            train=train,
            seed=self.seed,
            collate_fn=as_is,
            pin_memory=self.pin_memory,
        )
