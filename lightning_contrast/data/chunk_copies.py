"""Chunks of litdata that are copied from an address to this machine while they are read."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import OrderedDict
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from lightning_contrast._checks import fail, require

CLASSES = "classes.json"
"""File with the names of the classes, written by `write_shards`."""
_INDEX = "index.json"
_OWN = "process-"  # folder of one process
_PLAIN = {"bytes", "file", "image", "jpeg", "jpeg_array", "pil", "tensor", "no_header_tensor", "numpy"}
_PLAIN |= {"no_header_numpy", "bool", "int", "float", "str", "text", "json"}  # serializers of litdata without pickle


class ChunkCopies:
    """Copies chunks by litdata's downloaders, and keeps as many as fit.

    If all chunks fit, the processes of the machine share them, also in later epochs and runs. Otherwise each process
    copies the chunks that it reads to a folder of its own, and removes those that it has read longest ago: litdata's
    own cache evicts in the order of its own loader.

    Args:
        argument: Name of the argument, for messages.
        address: Folder of the chunks, such as ``s3://bucket/train``.
        cache: Folder of the copies.
        size: Size of all copies, in GB; None: without a limit.

    Attributes:
        chunks: litdata's description of each chunk.
        class_names: Names of the classes; empty if they are not known.
        keep: Number of chunks that each process keeps, if not all fit.
    """

    def __init__(self, argument: str, address: str, cache: Path, size: float | None) -> None:
        self.argument, self.address, self.size = argument, address, size
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="index-") as name:
            found = Path(name)
            self._fetch(_INDEX, found, required=True)
            self._fetch(CLASSES, found, required=False)
            self.chunks, _ = chunk_index(argument, found)
            self.class_names = class_names_of(found)
            content = address.encode() + (found / _INDEX).read_bytes()  # a new version gets a new folder
            self.folder = cache / hashlib.blake2b(content, digest_size=12).hexdigest()
            self.folder.mkdir(exist_ok=True)
            os.replace(found / _INDEX, self.folder / _INDEX)
        total = sum(chunk["chunk_bytes"] for chunk in self.chunks)
        self.shared = size is None or total <= size * 1e9
        self.keep = 2
        self._own: tuple[int, Path, OrderedDict[int, None]] | None = None
        self._removes: Any = None
        for path in self.folder.glob(f"{_OWN}*"):  # of killed processes
            if not _is_alive(int(path.name.removeprefix(_OWN).partition("-")[0])):
                shutil.rmtree(path, ignore_errors=True)

    def divide(self, readers: int, together: int) -> None:
        """Divide the size of the copies among the processes that read them.

        Args:
            readers: Number of processes on this machine, workers included.
            together: Number of chunks that each of them reads together.

        Raises:
            ValueError: If the size is too small for them.
        """
        if self.shared or self.size is None:
            return
        largest = max(chunk["chunk_bytes"] for chunk in self.chunks)
        needed = (together + 1) * readers * largest / 1e9
        hint = "Raise it, lower `mix_shards` or `num_workers`, or write smaller shards"
        rule = f"be at least {needed:.3g}, for {readers} workers on this machine that read {together} chunks together"
        require(needed <= self.size, "cache_gb", rule, self.size, hint)
        self.keep = int(self.size * 1e9 / (readers * largest))

    def folder_with(self, chunk: int) -> str:
        """Return a folder that has the index and a chunk, after copying it if it is not there."""
        from filelock import FileLock

        filename = self.chunks[chunk]["filename"]
        if self.shared:
            if not (self.folder / filename).is_file():
                with FileLock(self.folder / f"{filename}.copy"):
                    if not (self.folder / filename).is_file():
                        self._fetch(filename, self.folder, required=True)
            return str(self.folder)
        folder, held = self._of_this_process()
        held[chunk] = held.pop(chunk, None)  # the last one of the order
        if len(held) > self.keep:
            oldest, _ = held.popitem(last=False)
            (folder / self.chunks[oldest]["filename"]).unlink(missing_ok=True)
        if not (folder / filename).is_file():
            self._fetch(filename, folder, required=True)
        return str(folder)

    def release(self) -> None:
        """Remove the chunks of this process."""
        if self._own is not None and self._own[0] == os.getpid():
            self._removes()
        self._own = None

    def _of_this_process(self) -> tuple[Path, OrderedDict[int, None]]:
        if self._own is None or self._own[0] != os.getpid():
            folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=f"{_OWN}{os.getpid()}-"))
            shutil.copy(self.folder / _INDEX, folder / _INDEX)
            self._removes = Finalize(self, shutil.rmtree, (folder, True), exitpriority=1)  # also where a worker ends
            self._own = (os.getpid(), folder, OrderedDict())
        return self._own[1:]

    def _fetch(self, filename: str, folder: Path, *, required: bool) -> None:
        import_litdata()
        from litdata.streaming.downloader import get_downloader  # type: ignore[import-untyped]

        source = f"{self.address.rstrip('/')}/{filename}"
        try:
            get_downloader(self.address, str(folder), []).download_file(source, str(folder / filename))
            failure: object = "no such file"
        except Exception as error:
            if required:
                raise FileNotFoundError(f"`{self.argument}` cannot be read: {source}: {error}.") from error
            return
        if required and not (folder / filename).is_file():
            fail(self.argument, f"hold {filename}", self.address, f"Correct the address: {failure}", FileNotFoundError)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": None, "_removes": None}


def chunk_index(argument: str, folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the chunks that litdata's index in a folder lists, and whether they are compressed.

    Args:
        argument: Name of the argument, for messages.
        folder: Folder with ``index.json``.

    Raises:
        ValueError: If the index is damaged or empty, or names a serializer of litdata that may unpickle objects.
    """
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        chunks: list[dict[str, Any]] = [chunk for chunk in index["chunks"] if chunk["chunk_size"] > 0]
        compressed = index["config"]["compression"] is not None
        kinds = {str(kind).partition(":")[0] for kind in index["config"]["data_format"]}
    except (ValueError, KeyError, TypeError) as error:
        fail(argument, f"hold a valid index.json ({error!r})", str(folder), "Write the shards again")
    hint = f"They could run code. Write images as bytes, PIL images or tensors, and labels as int, to {folder}"
    require(kinds <= _PLAIN, argument, "hold records without pickled objects", sorted(kinds - _PLAIN), hint)
    require(bool(chunks), argument, "hold images", f"{folder} with empty shards", "Write the shards again")
    return chunks, compressed


def class_names_of(folder: Path) -> tuple[str, ...]:
    """Return the names of the classes that `write_shards` has written to a folder; empty if there are none."""
    file = folder / CLASSES
    return tuple(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ()


def file_size(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.is_file() else 0


def is_address(source: str) -> bool:
    """Return whether a source is an address that litdata copies from, such as ``s3://`` or ``gs://``."""
    return "://" in source or source.startswith("local:")


def import_litdata() -> Any:
    """Return the module litdata.

    Raises:
        ModuleNotFoundError: If the extra ``stream`` is not installed.
    """
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask PyPI in each process
    try:
        import litdata  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing("litdata") from error
    return litdata


def missing(library: str) -> ModuleNotFoundError:
    """Return the error for a library of the extra ``stream`` that is not installed."""
    return ModuleNotFoundError(f"These shards need {library}: pip install 'lightning_contrast[stream]'.")


def _is_alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        with contextlib.suppress(PermissionError):
            os.kill(process, 0)
        return True
    return False
