"""Data module for sharded image sets of any size: chunks of litdata or tar shards of webdataset."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from lightning_contrast._checks import check_at_least, check_choice, check_positive, check_word, fail, require
from lightning_contrast.data._folder_images import FolderImages, Sample, training_resize
from lightning_contrast.data.chunk_copies import is_address
from lightning_contrast.data.decoding import EncodedBatch, EncodedImage, decode, decoded_on, encoded, encoded_batch
from lightning_contrast.data.folder_module import ImageFolderDataModule
from lightning_contrast.data.loading import replicas_and_rank
from lightning_contrast.data.shard_order import ShardOrder
from lightning_contrast.data.shards import LitdataShards, Shards, Source, open_shards


class ShardImages(FolderImages):
    """Images of shards, decoded and resized on access.

    Args:
        shards: Names and records of the images.
        size: Height and width, in pixels.
        resize: "whole", "crop", "center" or "squash".
        labels: Whether to yield their labels; otherwise -1.
        exif: Turn images upright.
        on_device: Yield the content of the files, which `decoded_on` decodes.
        indices: Whether batches include the positions.
    """

    def __init__(
        self, shards: Shards, size: int, resize: str, *, labels: bool, exif: bool, on_device: bool, indices: bool
    ) -> None:
        super().__init__(shards, (), size, resize, partial(decode, exif=exif), indices=indices)
        self.shards, self.has_labels, self.exif, self.on_device = shards, labels, exif, on_device

    def fetch(self, position: int, seed: int | None) -> tuple[Any, int]:
        """Return the image of a record, decoded unless ``on_device``, and its label."""
        image, label = self.shards.read(position)
        label = label if self.has_labels else -1
        if isinstance(image, bytes | bytearray | memoryview):
            data = bytes(image)
            return (encoded(data, exif=self.exif, seed=seed) if self.on_device else self.loader(data)), label  # type: ignore[arg-type]
        if self.on_device:
            raise ValueError(f"its record holds a decoded image ({type(image).__name__}); use `decode='workers'`")
        if hasattr(image, "convert"):  # of PIL
            from torchvision.transforms.v2.functional import pil_to_tensor

            image = pil_to_tensor(image.convert("RGB"))
        return image, label

    def checked(self, value: Any) -> Any:
        """Return a decoded image as ``(C, H, W)``, uint8 or float32 in 0..1; an encoded one as it is."""
        return value if isinstance(value, EncodedImage) else super().checked(value)

    def square(self, image: Any, seed: int | None) -> Any:
        """Return the square ``(C, size, size)`` of a decoded image; an encoded one as it is."""
        return image if isinstance(image, EncodedImage) else super().square(image, seed)

    def collate(self, samples: Sequence[Sample | None]) -> Any:
        """Return images ``(B, C, size, size)``, labels ``(B,)`` and positions, or an `EncodedBatch` of them."""
        if not self.on_device:
            return super().collate(samples)
        images, labels, positions = zip(*[sample for sample in samples if sample is not None], strict=True)
        rest = [torch.tensor(labels), torch.tensor(positions)]
        names = [self.paths[position] for position in positions]
        return encoded_batch(images, names, rest if self.indices else rest[:1])


class StreamingImageDataModule(ImageFolderDataModule):
    """Data module for image sets in shards, which are read in sequence: sets larger than a disk, or on slow disks.

    The shards are chunks of litdata (``pip install 'lightning_contrast[stream]'``), of a folder or of an address such
    as ``s3://bucket/images``, whose chunks litdata copies to this machine while they are read; or uncompressed tar
    files in webdataset's layout (``0001.jpg``, ``0001.cls``). `write_shards`, or ``lightning-contrast optimize``, makes
    both of a folder of images.

    Batches, views, resizing, unreadable images and resume are as in `ImageFolderDataModule`: ``(images, labels)``,
    ``(B, 3, size, size)`` uint8, in training an `augment.WholeImages` (see ``resize``), and int64 ``(B,)``;
    ``indices=True`` adds the position in the set, int64 ``(B,)``. Images without a label carry -1.

    The order is a function of (seed, epoch), shards, batch size, processes, workers and ``mix_shards``, and comes from
    `ShardOrder`: litdata's own loader counts the passes, which a second pass for a k-NN probe would shift, and restarts
    tar files from their beginning. Each image comes once per epoch over all ranks and workers, up to those that do not
    fill a batch on every rank. A run resumes within an epoch at the same batch, without reading the images before it;
    with other settings or shards it raises an error that names them.

    Args:
        train: Folder or address of litdata's chunks; a folder of tar files; tar files with braces such as
            ``train-{000..099}.tar``; or a list of tar files.
        val: The same for validation, or None. It is read in order.
        size: Height and width of the images, in pixels, >= 1.
        batch_size: Images per batch on each rank, >= 1. In training a short last batch is dropped.
        num_workers: Worker processes on each rank, >= 0; each reads shards of its own in training.
        resize: "whole", "crop", "center" or "squash", as in `ImageFolderDataModule`.
        decode: "workers" decodes in the worker processes; "device" where the batch is used: on a CUDA device nvJPEG
            decodes the JPEGs of a batch in one call (its pixels may differ by a few levels from those of a CPU), other
            files and devices are decoded by the main process. Only a Trainer that has the data module does so: for
            loaders that you read yourself use "workers".
        labels: None yields the labels if the records have them, True requires them, False leaves them out.
        image_key: Key of the image in the records of litdata.
        label_key: Key of the label in the records of litdata, and in ``.json`` files of tar shards without ``.cls``.
        exif: Turn photographs upright by their EXIF orientation.
        on_error: "raise" or "skip", as in `ImageFolderDataModule`; `skipped` names the records. "skip" needs
            ``decode="workers"``.
        mix_shards: Number of shards that a worker reads together, to shuffle their images, >= 1. Write shards in a
            random order (as `write_shards` does), since batches are mixed from few of them.
        cache_dir: For an address: folder on a disk of this machine, to which chunks are copied.
        cache_gb: For an address: size of the copies of each set on this machine, in GB, > 0. If not all chunks fit,
            each worker keeps those that it reads, in validation two. None: without a limit.
        seed: Seed of the order and of the workers, >= 0.
        indices: Also yield the positions.
        pin_memory: Copy batches to page-locked memory, for faster transfer to an accelerator.

    Raises:
        ValueError: If a value is out of range; in `setup`, if there are no images, formats are mixed, a shard is
            incomplete, or ``labels=True`` and there are none.
        FileNotFoundError: In `setup`, if a folder or shard is missing.
        ModuleNotFoundError: In `setup`, if the extra ``stream`` is not installed.
    """

    what: ClassVar[str] = "images"

    def __init__(
        self,
        train: Source,
        val: Source | None = None,
        *,
        size: int = 256,
        batch_size: int = 256,
        num_workers: int = 4,
        resize: Literal["whole", "crop", "center", "squash"] = "whole",
        decode: Literal["workers", "device"] = "workers",
        labels: bool | None = None,
        image_key: str = "image",
        label_key: str = "label",
        exif: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
        mix_shards: int = 4,
        cache_dir: str | Path | None = None,
        cache_gb: float | None = None,
        seed: int = 0,
        indices: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            train,  # type: ignore[arg-type]  # its `setup` is not used
            val,  # type: ignore[arg-type]
            size=size,
            batch_size=batch_size,
            num_workers=num_workers,
            resize=resize,
            exif=exif,
            on_error=on_error,
            seed=seed,
            indices=indices,
            pin_memory=pin_memory,
        )
        check_choice("decode", decode, ("workers", "device"))
        hint = 'Set `decode="workers"`, whose workers replace an image before it is in a batch'
        require(
            decode == "workers" or on_error == "raise", "on_error", 'be "raise" with `decode="device"`', on_error, hint
        )
        check_word("image_key", image_key, "It is a key of the records")
        check_word("label_key", label_key, "It is a key of the records")
        check_at_least("mix_shards", mix_shards, 1)
        if cache_gb is not None:
            check_positive("cache_gb", cache_gb)
        remote = any(isinstance(source, str | Path) and is_address(str(source)) for source in self.dirs.values())
        for name, value in (("cache_dir", cache_dir), ("cache_gb", cache_gb)):
            hint = "Local shards are read where they are"
            require(value is None or remote, name, "be left out without an address", value, hint)
        self.decode, self.labels, self.exif, self.mix_shards = decode, labels, exif, mix_shards
        self.keys = {"image_key": image_key, "label_key": label_key, "cache_dir": cache_dir, "cache_gb": cache_gb}
        if decode == "device":  # set on the object: Lightning then prefers it to the module's hook of this name
            self.transfer_batch_to_device = self._to_device  # type: ignore[method-assign]

    def setup(self, stage: str | None = None) -> None:
        """Find the records of the shards; a second call does nothing.

        Args:
            stage: Not used; both splits are found in every stage.
        """
        if self._sets:
            return
        found = {split: open_shards(split, source, **self.keys) for split, source in self.dirs.items()}  # type: ignore[arg-type]
        for split, shards in found.items():
            hint = "Write them with labels, or set `labels=False`; training needs none"
            require(
                shards.labeled or not self.labels, split, "have labels, since `labels=True`", "records without", hint
            )
        self.class_names = found["train"].class_names
        if "val" in found:
            _check_validation(found["train"], found["val"], same=self.dirs["train"] == self.dirs["val"])
        for split, shards in found.items():
            labels = shards.labeled and self.labels is not False
            options = {"labels": labels, "exif": self.exif, "on_device": self.decode == "device"}
            self._sets[split] = ShardImages(shards, self.size, self.resize, indices=self.indices, **options)

    def training_order(self, dataset: FolderImages) -> ShardOrder:
        """Return the order in which each worker reads its own shards."""
        shards = dataset.shards  # type: ignore[attr-defined]
        replicas, _ = replicas_and_rank(self.trainer)
        workers = max(self.num_workers, 1)
        if isinstance(shards, LitdataShards) and shards.copies is not None:
            nodes = self.trainer.num_nodes if self.trainer is not None else 1
            shards.copies.divide(max(1, replicas // nodes) * workers, self.mix_shards)
        return ShardOrder(
            shards.sizes,
            replicas=replicas,
            workers=workers,
            batch_size=self.batch_size,
            mix_shards=self.mix_shards,
        )

    def _to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if not isinstance(batch, EncodedBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        training = training_resize(self.resize, self.trainer)
        return decoded_on(device, batch, size=self.size, training=training, evaluation=self.resize, exif=self.exif)


def _check_validation(train: Shards, val: Shards, *, same: bool) -> None:
    if same:
        message = f"{len(val)} validation images are training images too, so that validation scores are too high."
        warnings.warn(message, stacklevel=3)
    if train.class_names and val.class_names and train.class_names != val.class_names:
        other = sorted(set(train.class_names) ^ set(val.class_names))
        hint = "Write them with `like=` the training shards, which have the numbers of the classes"
        fail("val", "have the classes of `train`, in its order", other[:5], hint)
