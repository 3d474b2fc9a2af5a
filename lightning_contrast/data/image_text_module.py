"""Images with captions from tables or tar shards."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from lightning_contrast._checks import check_at_least, check_choice, check_word, fail, require
from lightning_contrast.data._folder_images import Loader, read_rgb, training_resize
from lightning_contrast.data._position import RemembersPosition
from lightning_contrast.data.loading import ResumableLoader, check_loading, make_loader, replicas_and_rank
from lightning_contrast.data.pair_shards import ShardLoader, ShardPairs
from lightning_contrast.data.pair_tables import Pair, PairImages, collate_pairs, read_pairs

Source = str | Path | Sequence[str | Path]


class ImageTextDataModule(RemembersPosition, L.LightningDataModule):
    """Data module for image-text pairs: a CSV, TSV, JSON-lines or parquet table, or tar shards.

    Batches are dicts: "image" ``(B, C, size, size)``, uint8, "text", a list of B strings, and for tables "index", the
    row, int64 ``(B,)``. Workers decode each image, turn it upright and resize it as `ImageFolderDataModule` does.

    A table has a header (or keys), one row per pair. All rows are checked in `setup`: an image that does not exist, an
    empty caption or a missing column raises an error that names the line. The order is a function of (seed, epoch) and
    resumes exactly within an epoch.

    Tar shards have webdataset's layout: the files of a pair follow each other and share a name, ``0001.jpg`` and
    ``0001.txt`` (or ``0001.json`` with the key ``text_column``). They are read by the library webdataset, locally or
    from an address that it opens, in turn by the ranks and their workers, in an order that is a function of (seed,
    epoch, rank, workers). With ``batches_per_epoch`` a run resumes within an epoch at the same batch, by reading the
    samples before it without decoding them; without, it resumes at the end of an epoch only, and else raises an error.

    Args:
        train: A table (``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``), or tar shards: one address, which may have braces
            such as ``train-{000..099}.tar``, or a list.
        val: The same for validation, or None. Shards are read by one process only.
        root: Folder of the relative paths of tables; None is the folder of each table.
        image_column: Column of the paths.
        text_column: Column of the captions; for shards the key in ``.json`` files.
        size: Height and width of the images, in pixels, >= 1.
        batch_size: Pairs per batch on each rank, >= 1. In training a short last batch is dropped.
        num_workers: Worker processes on each rank, >= 0.
        resize: "whole", "crop", "center" or "squash", as in `ImageFolderDataModule`; "whole" yields the images of a
            training batch as `augment.WholeImages`.
        loader: Function that reads one file of a table, as in `ImageFolderDataModule`; None reads RGB by Pillow.
        batches_per_epoch: For shards: batches of an epoch on each rank, >= 1; shards repeat as necessary. Several
            processes need it, since their shards may have unequal numbers of pairs.
        shuffle_buffer: For shards: pairs in memory from which the next one is drawn, >= 0; 0 keeps the order.
        seed: Seed of the order, >= 0.
        pin_memory: Copy batches to page-locked memory, for faster transfer to an accelerator.

    Raises:
        ValueError: If a value is out of range; in `setup`, if a row is not as it should be.
        FileNotFoundError: In `setup`, if a table, a shard or an image is missing.
        ModuleNotFoundError: In `setup`, if the extra ``pairs`` is not installed for parquet files or shards.
    """

    def __init__(
        self,
        train: Source,
        val: Source | None = None,
        *,
        root: str | Path | None = None,
        image_column: str = "path",
        text_column: str = "caption",
        size: int = 256,
        batch_size: int = 256,
        num_workers: int = 4,
        resize: Literal["whole", "crop", "center", "squash"] = "whole",
        loader: Loader | None = None,
        batches_per_epoch: int | None = None,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        check_loading(batch_size, seed)
        check_word("image_column", image_column, "It names a column of the table")
        check_word("text_column", text_column, "It names a column of the table")
        check_at_least("size", size, 1)
        check_at_least("num_workers", num_workers, 0)
        check_choice("resize", resize, ("whole", "crop", "center", "squash"))
        check_at_least("shuffle_buffer", shuffle_buffer, 0)
        self.sources = {"train": train} | ({} if val is None else {"val": val})
        shards = {split: _is_shards(source) for split, source in self.sources.items()}
        if batches_per_epoch is not None:
            check_at_least("batches_per_epoch", batches_per_epoch, 1)
            hint = "A table's epoch is the whole table"
            require(shards["train"], "batches_per_epoch", "be left out for tables", batches_per_epoch, hint)
        if loader is not None:
            hint = "The images of shards are read by Pillow"
            require(not any(shards.values()), "loader", "be left out for tar shards", loader, hint)
        self.root, self.image_column, self.text_column = root, image_column, text_column
        self.size, self.batch_size, self.num_workers, self.resize = size, batch_size, num_workers, resize
        self.loader: Loader = partial(read_rgb, exif=True) if loader is None else loader
        self.batches_per_epoch, self.shuffle_buffer = batches_per_epoch, shuffle_buffer
        self.seed, self.pin_memory = seed, pin_memory
        self._shards = shards
        self._pairs: dict[str, list[Pair]] = {}
        self._urls: dict[str, list[str]] = {}
        if val is None:  # Lightning skips validation if this hook is not overridden
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def setup(self, stage: str | None = None) -> None:
        """Read the tables, or list the shards; a second call does nothing.

        Args:
            stage: Not used; both splits are read in every stage.
        """
        # Lightning warns of every iterable dataset with a length; the shards are divided among the workers here.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        root = None if self.root is None else Path(self.root)
        for split, source in self.sources.items():
            if split in self._pairs or split in self._urls:
                continue
            if self._shards[split]:
                self._urls[split] = _shard_urls(split, source)
            else:
                table = Path(source)  # type: ignore[arg-type]  # a list is one of shards
                self._pairs[split] = read_pairs(table, self.image_column, self.text_column, root)

    def pairs(self, split: str = "train") -> list[Pair]:
        """Return the paths and captions of a table; the positions of "index" refer to this list.

        Args:
            split: "train" or "val".

        Raises:
            ValueError: If the split is read from shards or does not exist.
        """
        self.setup()
        check_choice("split", split, self._pairs)
        return list(self._pairs[split])

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches of the training pairs, with exact resume within an epoch."""
        return self._remember(self._loader("train", train=True))

    def val_dataloader(self) -> ResumableLoader:
        """Return the validation pairs in order."""
        return self._loader("val", train=False)

    def _loader(self, split: str, *, train: bool) -> ResumableLoader:
        check_choice("split", split, self.sources)
        self.setup()
        options: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": self.pin_memory}
        if self._shards[split]:
            return self._shard_loader(split, train=train, **options)
        dataset = PairImages(self._pairs[split], self.size, self._resize(train), self.loader)
        options |= {"trainer": self.trainer, "train": train, "seed": self.seed, "collate_fn": dataset.collate}
        return make_loader(dataset, self.batch_size, **options)

    def _resize(self, train: bool) -> str:
        if train:
            return training_resize(self.resize, self.trainer)
        return "squash" if self.resize == "squash" else "center"

    def _shard_loader(self, split: str, *, train: bool, **options: Any) -> ShardLoader:
        replicas, rank = replicas_and_rank(self.trainer)
        batches = self.batches_per_epoch if train else None
        rule, hint = f"be given for {replicas} processes", "Their shards may have unequal numbers of pairs"
        if not train:
            rule, hint = f"not be tar shards for {replicas} processes", "Give a table for validation"
        require(replicas == 1 or batches is not None, "batches_per_epoch" if train else "val", rule, batches, hint)
        urls, readers = self._urls[split], replicas * max(options["num_workers"], 1)
        hint = "Lower `num_workers`, or write more shards"
        require(len(urls) >= readers, split, f"have a shard for each of {readers} readers", len(urls), hint)
        dataset = ShardPairs(
            urls,
            self.size,
            self._resize(train),
            self.text_column,
            batch_size=self.batch_size,
            batches=batches,
            shuffle=self.shuffle_buffer if train else 0,
            seed=self.seed,
            rank=rank,
            replicas=replicas,
        )
        loader = ShardLoader(
            dataset,
            batch_size=self.batch_size,
            drop_last=train,
            collate_fn=collate_pairs,
            generator=torch.Generator(),
            **options,
        )
        loader.trainer = self.trainer
        return loader


def _is_shards(source: Source) -> bool:
    return not isinstance(source, str | Path) or str(source).rstrip().endswith((".tar", ".tgz", ".tar.gz"))


def _shard_urls(split: str, source: Source) -> list[str]:
    """Return the addresses of shards after expanding braces and checking that local files exist."""
    try:
        from webdataset.shardlists import expand_urls  # type: ignore[import-untyped]
    except ImportError as error:
        hint = "pip install 'lightning_contrast[pairs]'"
        raise ModuleNotFoundError(f"Tar shards need webdataset: {hint}.") from error
    given = [source] if isinstance(source, str | Path) else source
    urls = [url for one in given for url in expand_urls(str(one))]
    require(len(urls) > 0, split, "name at least one shard", source, "Give the tar files")
    missing = [url for url in urls if ":" not in url and not Path(url).is_file()]
    if missing:
        fail(split, "name existing tar files", missing[:3], "Correct the addresses", FileNotFoundError)
    return urls
