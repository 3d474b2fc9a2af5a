"""Records of sharded image sets by their position: chunks of litdata and tar shards of webdataset."""

import json
import os
import tarfile
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from lightning_contrast._checks import fail, require
from lightning_contrast.data.chunk_copies import (
    ChunkCopies,
    chunk_index,
    class_names_of,
    file_size,
    import_litdata,
    is_address,
    missing,
)
from lightning_contrast.data.pair_shards import IMAGES

Source = str | Path | Sequence[str | Path]


class Shards(Sequence[str]):
    """Names of the images of a set, each with its record.

    Attributes:
        sizes: Number of images of each shard.
        labeled: Whether the records have labels.
        class_names: Names of the classes; empty if they are not known.
    """

    sizes: list[int]
    labeled: bool
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(self.sizes)

    @abstractmethod
    def read(self, position: int) -> tuple[Any, int]:
        """Return the image of a record, encoded or decoded, and its label; -1 if there is none."""

    def _place(self, position: int) -> tuple[int, int]:
        """Return the shard of a position and the place in it."""
        shard = bisect_right(self._ends, position)
        return shard, position - (self._ends[shard] - self.sizes[shard])

    def _sized(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self._ends = list(accumulate(self.sizes))


class LitdataShards(Shards):
    """Images in chunks that litdata's ``optimize`` or `write_shards` has written.

    A record is a dict, ``{"image": ..., "label": ...}``, a pair (image, label), or an image: the content of a file, or
    whatever litdata's serializers restore as a tensor or a PIL image.

    Args:
        argument: Name of the argument, for messages.
        folder: Folder with ``index.json``; its chunks may be missing if there are ``copies``.
        image_key: Key of the image in a dict.
        label_key: Key of the label in a dict.
        copies: What copies chunks to the folder before they are read, and ``folder`` is then None.
    """

    def __init__(
        self, argument: str, folder: str | None, image_key: str, label_key: str, copies: "ChunkCopies | None" = None
    ) -> None:
        self.folder = str(folder) if copies is None else copies.address
        self.image_key, self.label_key, self.copies = image_key, label_key, copies
        self._opened: tuple[int, str, Any] | None = None
        self._chunks = _chunks_of(argument, Path(self.folder)) if copies is None else copies.chunks
        self.class_names = class_names_of(Path(self.folder)) if copies is None else copies.class_names
        self._sized([chunk["chunk_size"] for chunk in self._chunks])
        try:
            first = self._record(0)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            hint = "Write the shards again"
            raise ValueError(f"`{argument}` must be readable by litdata, got {folder!r}: {reason}. {hint}.") from error
        if isinstance(first, dict) and image_key not in first:
            fail(argument, f"have the key {image_key!r} in its records", sorted(first), "Set `image_key`")
        self.labeled = self._parts(first)[1] is not None
        self._opened = None  # each process opens it for itself
        if copies is not None:
            copies.release()

    def __getitem__(self, position: Any) -> Any:
        shard, place = self._place(position)
        return f"{self.folder.rstrip('/')}/{self._chunks[shard]['filename']}, record {place}"

    def read(self, position: int) -> tuple[Any, int]:
        """Return the image of a record, encoded or decoded, and its label; -1 if there is none."""
        image, label = self._parts(self._record(position))
        return image, -1 if label is None else int(label)

    def _parts(self, record: Any) -> tuple[Any, Any]:
        if isinstance(record, dict):
            return record[self.image_key], record.get(self.label_key)
        if isinstance(record, tuple | list):
            return record[0], record[1] if len(record) > 1 else None
        return record, None

    def _record(self, position: int) -> Any:
        folder = self.folder if self.copies is None else self.copies.folder_with(self._place(position)[0])
        if self._opened is None or self._opened[:2] != (os.getpid(), folder):
            litdata = import_litdata()
            self._opened = (os.getpid(), folder, litdata.StreamingDataset(folder))
        return self._opened[2][position]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


class TarShards(Shards):
    """Images in tar files of webdataset's layout, found by one pass over the headers of the files.

    A sample is the files of a shard with one name: an image, and optionally its class: the number in ``<name>.cls``, or
    in ``<name>.json`` under ``label_key``.

    Args:
        argument: Name of the argument, for messages.
        shards: Uncompressed tar files.
        label_key: Key of the label in a ``.json`` file.
    """

    def __init__(self, argument: str, shards: Sequence[str], label_key: str) -> None:
        self.shards = list(shards)
        found, labels, sizes = [], [], []
        for shard in self.shards:
            rows = list(_samples(argument, shard, label_key))
            hint = f"A sample is an image ({', '.join(IMAGES)}) and a number in .cls, with one name; remove the file"
            require(bool(rows), argument, "hold samples in every shard", shard, hint)
            found += [row[:2] for row in rows]
            labels += [-1 if row[2] is None else row[2] for row in rows]
            sizes.append(len(rows))
            if (rows[0][2] is None) != (labels[0] < 0) or any((row[2] is None) != (rows[0][2] is None) for row in rows):
                hint = "Write a .cls file for all samples, or for none"
                fail(argument, "have labels in all samples or in none", shard, hint)
        self._spans, self._labels = np.array(found, dtype=np.int64), np.array(labels, dtype=np.int64)
        self._sized(sizes)
        self.labeled = bool((self._labels >= 0).all())
        self.class_names = class_names_of(Path(self.shards[0]).parent)
        self._files: dict[int, int] = {}  # of this process
        self._process = os.getpid()

    def __getitem__(self, position: Any) -> Any:
        shard, _ = self._place(position)
        start = int(self._spans[position, 0]) - tarfile.BLOCKSIZE
        with open(self.shards[shard], "rb") as file:
            file.seek(start)
            header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        return f"{self.shards[shard]}, file {header.name}"

    def read(self, position: int) -> tuple[Any, int]:
        """Return the content of the image's file and its label; -1 if there is none."""
        shard, _ = self._place(position)
        start, length = self._spans[position].tolist()
        if self._process != os.getpid():
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            if len(self._files) >= 64:  # open files of a process are limited
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], length, start)
        if len(data) < length:
            raise OSError(f"its shard ends after {len(data)} of {length} bytes")
        return data, int(self._labels[position])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():  # a forked worker has other descriptors of these numbers
            for file in self._files.values():
                os.close(file)


def open_shards(
    argument: str,
    source: Source,
    *,
    image_key: str = "image",
    label_key: str = "label",
    cache_dir: str | Path | None = None,
    cache_gb: float | None = None,
) -> Shards:
    """Find the records of a set.

    Args:
        argument: Name of the argument, for messages.
        source: Folder or address of litdata's chunks; folder of tar files; one tar file, or several with braces such as
            ``train-{000..099}.tar``; or a list of tar files.
        image_key: Key of the image in a record of litdata.
        label_key: Key of the label in a record of litdata, or in a ``.json`` file.
        cache_dir: Folder to which chunks of an address are copied.
        cache_gb: Size of the copies on this machine, in GB; None: without a limit.

    Raises:
        FileNotFoundError: If a folder or shard is missing.
        ValueError: If there are no images, or the formats are mixed.
        ModuleNotFoundError: If the extra ``stream`` is not installed.
    """
    given = [str(source)] if isinstance(source, str | Path) else [str(one) for one in source]
    require(bool(given), argument, "name a folder or tar files", source, "Give the folder of the shards")
    tars = [one for one in given if one.rstrip().endswith((".tar", ".tgz", ".tar.gz"))]
    if not tars and len(given) == 1:
        if is_address(given[0]):
            hint = "Give a folder on a fast disk of this machine, to which chunks are copied"
            require(cache_dir is not None, "cache_dir", "be given for an address", cache_dir, hint)
            copies = ChunkCopies(argument, given[0], Path(str(cache_dir)), cache_gb)
            return LitdataShards(argument, None, image_key, label_key, copies)
        return _open_folder(argument, Path(given[0]), image_key, label_key)
    hint = "Use one format: a folder that litdata wrote, or tar files"
    require(len(tars) == len(given), argument, "be tar files or one folder, not both", given[:3], hint)
    return TarShards(argument, _expanded(argument, tars), label_key)


def _open_folder(argument: str, folder: Path, image_key: str, label_key: str) -> Shards:
    if not folder.is_dir():
        fail(argument, "be an existing folder", str(folder), "Set it to the folder of your shards", FileNotFoundError)
    chunked, tars = (folder / "index.json").is_file(), sorted(str(file) for file in folder.glob("*.tar"))
    hint = f"It has index.json of litdata and {len(tars)} tar files: move one of them to a folder of its own"
    require(not (chunked and tars), argument, "hold shards of one format", str(folder), hint)
    if tars:
        return TarShards(argument, tars, label_key)
    hint = "Make them of a folder of images with `lightning-contrast optimize FOLDER OUTPUT`, or `data.write_shards`"
    require(chunked, argument, "hold shards (litdata's index.json, or *.tar)", str(folder), hint)
    return LitdataShards(argument, str(folder), image_key, label_key)


def _expanded(argument: str, given: list[str]) -> list[str]:
    """Return local tar files, after expanding braces."""
    try:
        from webdataset.shardlists import expand_urls  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing("webdataset") from error
    files = [file for one in given for file in expand_urls(one)]
    for file in files:
        hint = "Unpack it: images are read at their place in the file"
        require(file.endswith(".tar"), argument, "be uncompressed tar files", file, hint)
        hint = "Copy or mount it, or write the images with litdata, which reads from addresses"
        require(not is_address(file), argument, "be local tar files", file, hint)
    absent = [file for file in files if not Path(file).is_file()]
    if absent:
        fail(argument, "name existing tar files", absent[:3], "Correct the paths", FileNotFoundError)
    return files


def _samples(argument: str, shard: str, label_key: str) -> Iterator[tuple[int, int, int | None]]:
    """Yield the place and length of each image of a tar file, and its label."""
    try:
        from webdataset.tariterators import base_plus_ext  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing("webdataset") from error
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                name, ending = base_plus_ext(member.name)
                if member.isfile() and name is not None:
                    files = samples.setdefault(name, {})
                    hint = "Give each sample its own name"
                    require(ending.lower() not in files, shard, "have each file once", member.name, hint)
                    files[ending.lower()] = member
            for name, files in samples.items():
                image = next((files[ending] for ending in IMAGES if ending in files), None)
                if image is None:
                    hint = f"Remove sample {name}, or write its image"
                    fail(shard, f"have an image in each sample ({', '.join(IMAGES)})", sorted(files), hint)
                yield image.offset_data, image.size, _label(tar, shard, name, files, label_key)
    except tarfile.TarError as error:
        fail(argument, f"be readable tar files ({error})", shard, "Write or copy it again")


def _label(
    tar: tarfile.TarFile, shard: str, name: str, files: dict[str, tarfile.TarInfo], label_key: str
) -> int | None:
    member = files.get("cls") or files.get("json")
    content = None if member is None else tar.extractfile(member)
    if member is None or content is None:
        return None
    text = content.read().decode()
    try:
        value = text if "cls" in files else json.loads(text).get(label_key)
        label = None if value is None else int(value)
    except ValueError:
        label = -1
    if label is not None and label < 0:
        fail(f"{shard}, {member.name}", "hold the number of a class, >= 0", text[:50], f"Repair sample {name}")
    return label


def _chunks_of(argument: str, folder: Path) -> list[dict[str, Any]]:
    """Return the chunks that litdata's index lists, after checking that they are complete."""
    chunks, compressed = chunk_index(argument, folder)
    for chunk in chunks:
        hint = "Copy the folder again: the shard is missing or cut off"
        size = file_size(folder / chunk["filename"])
        complete = size > 0 if compressed else size >= chunk["chunk_bytes"]
        require(complete, argument, f"hold the {chunk['chunk_bytes']} bytes of {chunk['filename']}", size, hint)
    return chunks
