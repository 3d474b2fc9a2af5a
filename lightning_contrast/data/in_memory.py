"""Base class of data modules whose images fit in memory as uint8."""

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
from lightning_contrast.data.structured_batches import StructuredBatches

Split = Literal["train", "val", "test"]
SPLITS = ("train", "val", "test")


class InMemoryDataModule(RemembersPosition, L.LightningDataModule):
    """Data module for uint8 images in memory, without workers and without Python code per image.

    Subclasses implement `read`, which is called once per split. Batches are ``(images, labels)``:
    uint8 ``(B, C, H, W)`` and int64 ``(B,)``; ``indices=True`` adds the position in the split, int64 ``(B,)``.

    Args:
        batch_size: Images per batch on each rank, >= 1. In training a short last batch is dropped.
        seed: Seed of the training order, which is a function of (seed, epoch), >= 0.
        indices: Also yield the positions.
        pin_memory: Copy batches to page-locked memory, for faster transfer to an accelerator.
        batches: Near neighbors in each training batch, see `StructuredBatches`; None shuffles all images.
    """

    def __init__(
        self,
        batch_size: int = 256,
        *,
        seed: int = 0,
        indices: bool = False,
        pin_memory: bool = False,
        batches: StructuredBatches | None = None,
    ) -> None:
        super().__init__()
        check_loading(batch_size, seed)
        self.batches = batches
        self.batch_size, self.seed, self.indices, self.pin_memory = batch_size, seed, indices, pin_memory
        self._splits: dict[str, MemoryImages] = {}

    @abstractmethod
    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the images ``(N, C, H, W)`` uint8 and the labels ``(N,)`` int64 of a split."""

    def dataset(self, split: Split) -> MemoryImages:
        """Return a split as a dataset; it is read at the first call.

        Args:
            split: "train", "val" or "test".
        """
        check_choice("split", split, SPLITS)
        if split not in self._splits:
            self._splits[split] = self.make_dataset(split)
        return self._splits[split]

    def make_dataset(self, split: Split) -> MemoryImages:
        """Read a split; a subclass may return a dataset with further items.

        Args:
            split: "train", "val" or "test".
        """
        return MemoryImages(*self.read(split), indices=self.indices)

    def images(self, split: Split = "train") -> Tensor:
        """Return all images of a split, uint8 ``(N, C, H, W)``."""
        return self.dataset(split).images

    def labels(self, split: Split = "train") -> Tensor:
        """Return all labels of a split, int64 ``(N,)``."""
        return self.dataset(split).labels

    def setup(self, stage: str | None = None) -> None:
        """Read the splits of a stage that have not been read.

        Args:
            stage: "fit", "validate", "test", "predict", or None for all.
        """
        # Lightning advises workers for every loader without them; here they would be slower.
        warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
        wanted: dict[str | None, tuple[str, ...]] = {"fit": ("train", "val"), "validate": ("val",), None: SPLITS}
        for split in wanted.get(stage, ("test",)):
            self.dataset(cast("Split", split))

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches of the training split, with exact resume within an epoch."""
        return self._remember(self._loader("train", train=True))

    def val_dataloader(self) -> ResumableLoader:
        """Return the validation split in order."""
        return self._loader("val")

    def test_dataloader(self) -> ResumableLoader:
        """Return the test split in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test split in order, each image once for any number of ranks."""
        # Lightning splits a sequential sampler between ranks for prediction without repeating rows.
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
            batches=self.batches,
            collate_fn=as_is,
            pin_memory=self.pin_memory,
        )
