"""Tar shards of images and captions in webdataset's layout, in an order that resumes within an epoch."""

import json
import random
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_contrast._checks import check_caption, fail, require
from lightning_contrast.data._folder_images import as_image, read_rgb, resized
from lightning_contrast.data.loading import Layout, ResumableLoader
from lightning_contrast.seeding import derived_seed

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff", "gif")
"""Extensions of a sample's image, without the dot, in the order in which they are looked up."""


class ShardPairs(IterableDataset[tuple[Tensor, str]]):
    """The samples of one rank: its shards in a drawn order, through a shuffle buffer.

    A sample is the files of a shard with one name: an image and ``<name>.txt``, or ``<name>.json`` with the key
    ``text_column``. Ranks and workers take whole shards in turn. The order is a function of (seed, epoch, rank, number
    of workers).

    Args:
        shards: Files or addresses that webdataset opens.
        size: Height and width, in pixels.
        resize: "whole", "crop", "center" or "squash", as for a training image.
        text_column: Key of the caption in a ``.json`` file.
        batch_size: Images per batch on each rank.
        batches: Batches per epoch on each rank; the shards repeat, in a new order, until they are full. None: each
            shard once.
        shuffle: Number of samples in the shuffle buffer; 0 keeps the order of the shards.
        seed: Seed of the order.
        rank: Rank of this process.
        replicas: Number of processes that share the shards.
    """

    def __init__(
        self,
        shards: Sequence[str],
        size: int,
        resize: str,
        text_column: str,
        *,
        batch_size: int,
        batches: int | None,
        shuffle: int,
        seed: int,
        rank: int,
        replicas: int,
    ) -> None:
        self.shards, self.size, self.resize, self.text_column = list(shards), size, resize, text_column
        self.batch_size, self.batches, self.shuffle, self.seed = batch_size, batches, shuffle, seed
        self.rank, self.replicas = rank, replicas
        self.epoch = self.start = 0  # set by the loader before a pass: it skips `start` batches

    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        # Number n makes the batches n, n + workers, ...; the first worker is asked first, also after a resume.
        number = 0 if worker is None else (worker.id + self.start) % workers
        skipped = len(range(number, self.start, workers)) * self.batch_size
        wanted = None if self.batches is None else len(range(number, self.batches, workers)) * self.batch_size
        for place, (sample, seed) in enumerate(self._samples(number, workers)):
            if place == wanted:
                return
            if place >= skipped:  # skipped samples are not decoded
                yield self._decoded(sample, seed)

    def _samples(self, worker: int, workers: int) -> Iterator[tuple[dict[str, Any], int]]:
        own, pass_number = self.rank * workers + worker, 0
        while True:
            order, found = list(self.shards), False
            generator = random.Random(derived_seed(self.seed, self.epoch, pass_number))  # noqa: S311 - equal on all ranks
            if self.shuffle:
                generator.shuffle(order)
            for found_sample in self._read(order[own :: self.replicas * workers], own, pass_number):
                found = True
                yield found_sample
            if self.batches is None:
                return
            hint = "Give more shards, or fewer workers and processes"
            require(found, "shards", "give each worker of each process a sample", len(self.shards), hint)
            pass_number += 1

    def _read(self, shards: list[str], own: int, pass_number: int) -> Iterator[tuple[dict[str, Any], int]]:
        draws = random.Random(derived_seed(self.seed, self.epoch, pass_number, own + 1))  # noqa: S311
        buffer: list[dict[str, Any]] = []
        for sample in _samples_of(shards):
            buffer.append(sample)
            if len(buffer) > self.shuffle:
                place = draws.randrange(len(buffer)) if self.shuffle else 0
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                yield buffer.pop(), draws.getrandbits(62)
        if self.shuffle:
            draws.shuffle(buffer)
        for sample in buffer:
            yield sample, draws.getrandbits(62)

    def _decoded(self, sample: dict[str, Any], seed: int) -> tuple[Tensor, str]:
        where = f"{sample['__url__']}, sample {sample['__key__']}"
        image = next((sample[key] for key in IMAGES if key in sample), None)
        found = sorted(key for key in sample if not key.startswith("__"))
        if image is None:
            fail(where, f"have an image ({', '.join(IMAGES)})", found, "Write one image per sample")
        if "txt" in sample:
            caption: object = sample["txt"].decode()
        elif "json" in sample:
            caption = json.loads(sample["json"]).get(self.text_column)
        else:
            fail(where, "have a caption (txt or json)", found, "Write one text per sample")
        try:
            pixels = as_image(read_rgb(BytesIO(image)))
        except Exception as error:
            raise RuntimeError(f"Cannot read the image of {where}: {str(error).rstrip('.')}.") from error
        return resized(pixels, self.size, self.resize, seed), check_caption(caption, where)


def _samples_of(shards: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the samples of shards: the contents of files by extension, ``__key__`` and ``__url__``."""
    from webdataset.gopen import gopen  # type: ignore[import-untyped]
    from webdataset.tariterators import group_by_keys, tar_file_iterator  # type: ignore[import-untyped]

    for shard in shards:
        with gopen(shard) as stream:
            yield from group_by_keys(file | {"__url__": shard} for file in tar_file_iterator(stream))


class ShardLoader(ResumableLoader):
    """A loader of `ShardPairs` that resumes within an epoch at the same batch; it reads the samples before it again.

    Lightning restores it as any `ResumableLoader`. The epoch is the Trainer's.
    """

    trainer: Any = None
    _complete: bool = False  # whether the last pass has ended
    _first_epoch: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a `ResumableLoader`, and whether the pass over the shards has ended."""
        return super().state_dict() | {"complete": self._complete}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next pass at a saved position, or with the next epoch if the saved one is complete.

        Args:
            state: The value returned by `state_dict`.
        """
        super().load_state_dict(state)
        if state["complete"]:  # Lightning may ask for the first batch before it counts the epoch
            self._first_epoch = int(state["epoch"]) + 1

    def __len__(self) -> int:
        """Return the number of batches per epoch.

        Raises:
            TypeError: If it is not known, as for any iterable dataset.
        """
        batches = cast("ShardPairs", self.dataset).batches
        if batches is None:
            raise TypeError("The number of samples in tar shards is not known; give `batches_per_epoch`.")
        return batches

    def _from(self, start: int) -> Iterator[Any]:
        dataset = cast("ShardPairs", self.dataset)
        dataset.epoch, dataset.start = self._sampler_epoch(), start
        if self.generator is not None:
            self.generator.manual_seed(derived_seed(dataset.seed, dataset.epoch, dataset.rank + 1))
        self._complete = False
        yield from DataLoader.__iter__(self)
        self._complete = True

    def _start(self, resume: dict[str, Any] | None, epoch: int) -> int:
        if resume is None or resume["epoch"] != epoch:
            return 0
        start, batches = int(resume["position"]), cast("ShardPairs", self.dataset).batches
        if start and batches is None:  # Lightning then fetches a batch more than it has trained on
            raise ValueError(
                "Tar shards resume within an epoch only if its length is known. Set `batches_per_epoch`, or resume "
                "from a checkpoint at the end of an epoch."
            )
        start %= batches or 1
        layout = self._layout()
        if start and resume["layout"] != layout:
            raise ValueError(
                f"A run that stopped within an epoch must resume with the same data layout, got {layout} instead of "
                f"{resume['layout']}. Use the same settings, or resume from a checkpoint at the end of an epoch."
            )
        return start

    def _sampler_epoch(self) -> int:
        epoch = self._epoch if self.trainer is None else int(self.trainer.current_epoch)
        return max(epoch, self._first_epoch)

    def _layout(self) -> Layout:
        data = cast("ShardPairs", self.dataset)
        layout = {"shards": len(data.shards), "batch_size": data.batch_size, "processes": data.replicas}
        return layout | {"seed": data.seed, "workers": self.num_workers, "shuffle": data.shuffle}
