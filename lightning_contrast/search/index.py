"""A folder of images in a vector store: kept up to date, searched by images and words, judged for duplicates."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.data import find_images
from lightning_contrast.data.folder_module import EXTENSIONS
from lightning_contrast.nn.byte_tokenizer import Tokenizer
from lightning_contrast.search.near_duplicates import Duplicates, group_duplicates
from lightning_contrast.search.store import VectorTable, quoted
from lightning_contrast.serving.embedder import Embedder, open_embedder
from lightning_contrast.serving.pictures import RefusedImageError, decode_image

Query = str | Path | bytes | Tensor | NDArray[np.float32]
FILE_PIXELS = 89_000_000
"""Largest number of pixels of a file of the folder, about that of which Pillow warns."""
_FORMAT = 1


class Hit(NamedTuple):
    """An image that was found.

    Attributes:
        path: Path of the file, relative to the folder of the index.
        score: Cosine to the query, in -1..1.
        folder: Folder of the file, relative to that of the index, which is "." itself.
        width: Width of the image, in pixels, upright.
        height: Height.
        digest: Digest of the content of the file.
    """

    path: str
    score: float
    folder: str
    width: int
    height: int
    digest: str


@dataclass
class IndexUpdate:
    """What an update of an index did.

    Attributes:
        added: Paths of images that are new.
        changed: Paths of images whose file has another size or time of change, and were embedded again.
        removed: Paths of images that are gone, or cannot be read any more.
        unreadable: Reason for each file that cannot be read; it is not in the index.
        unchanged: Number of images that were left as they were.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0


class ImageIndex:
    """Vectors of the images of a folder, in a LanceDB table. Needs ``pip install 'lightning_contrast[search]'``.

    The digests of the model and of its preprocessing are stored: vectors of different models are never compared.
    Images are committed in batches; an update that is killed loses at most the batch at work, and the next one
    continues.

    Args:
        store: Folder of the store; it is created at the first use.
        model: What `open_embedder` takes, such as an ONNX graph or the folder of `export_towers`. None opens an index
            that exists for queries by vectors.
        folder: Folder of the images; None reads that of an index that exists. Hidden files are left out.
        tokenizer: See `open_embedder`.

    Attributes:
        folder: Folder of the images.
        embedder: The model, or None.

    Raises:
        ValueError: If the index was made by another model, preprocessing or for another folder, or the folder of the
            store holds other files.
        FileNotFoundError: If there is no folder of images, no model, or no index and ``folder`` or ``model`` is None.
        ModuleNotFoundError: If the extra is not installed.

    Example:
        >>> index = ImageIndex("store", "image.onnx", "photos")  # doctest: +SKIP
        >>> index.update().added  # doctest: +SKIP
        ['beach.jpg', 'town/house.jpg']
        >>> index.search(Path("query.jpg"), k=5, where="folder = 'town'")  # doctest: +SKIP
    """

    def __init__(
        self,
        store: str | Path,
        model: str | Path | nn.Module | Embedder | None = None,
        folder: str | Path | None = None,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.embedder = None if model is None else open_embedder(model, tokenizer=tokenizer)
        given = None if folder is None else Path(folder).resolve()
        if given is not None and not given.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}.")
        facts = None
        if self.embedder is not None and given is not None:
            facts = self._facts(self.embedder) | {"folder": str(given)}
        self._table = VectorTable(Path(store), facts, 0 if self.embedder is None else self.embedder.dim)
        saved = self._table.facts
        for name, value in {} if self.embedder is None else self._facts(self.embedder).items():
            hint = "Use the model of the index, or make a new index: vectors of different models cannot be compared"
            require(saved.get(name) == value, "model", f"have the {name} of the index", value, hint)
        hint = f"The index is that of {saved['folder']}; make another one"
        require(given is None or str(given) == saved["folder"], "folder", "be that of the index", str(given), hint)
        self.folder = Path(saved["folder"])

    @staticmethod
    def _facts(embedder: Embedder) -> dict[str, Any]:
        digests = {"model digest": embedder.model_digest, "preprocessing digest": embedder.preprocessing_digest}
        return digests | {"dim": embedder.dim, "format": _FORMAT}

    def __len__(self) -> int:
        return len(self._table)

    def update(self, *, batch_size: int = 64, verify: bool = False) -> IndexUpdate:
        """Add new images of the folder, embed changed ones again, and remove those that are gone.

        Args:
            batch_size: Images of a commit and of a pass of the model, >= 1.
            verify: Compare the contents of all files with those that were embedded, instead of their sizes and times.

        Returns:
            What was done.

        Raises:
            ValueError: If the index was opened without a model, or the folder has no images any more.
            RuntimeError: If another process is writing to the index.
        """
        check_at_least("batch_size", batch_size, 1)
        embedder = self.model_for("update")
        paths = self._find()
        hint = "Check that the folder is there as before: an update would empty the index"
        require(bool(paths) or not len(self), "folder", "have images", str(self.folder), hint)
        done = IndexUpdate()
        with self._table.writing():
            stored = self._table.columns("path", "bytes", "changed_ns", "digest")
            known = {path: stat for path, *stat in zip(*stored.values(), strict=True)}
            pending = list(self._pending(paths, known, verify, done))
            removed = sorted(known.keys() - set(paths))
            for start in range(0, len(pending), batch_size):
                removed += self._embed(embedder, pending[start : start + batch_size], known, done)
            self._table.remove(removed)
            done.removed = sorted(removed)
            if pending or removed:
                self._table.compact()
        return done

    def search(self, query: Query, k: int = 10, *, where: str | None = None, probes: int | None = None) -> list[Hit]:
        """Return the images with the highest cosine to a query, highest first.

        Args:
            query: Words (a str, of a model with a text tower); the path (a `Path`) or content (bytes) of an image file;
                pixels (3, H, W), uint8; or a vector (D,), a NumPy array.
            k: Number of images, >= 1.
            where: SQL condition on ``path``, ``folder``, ``width``, ``height``, ``bytes``, ``changed_ns`` and
                ``digest``; images are filtered before they are compared. Never make it of text from others.
            probes: Lists of the index of `build_index` that are searched, >= 1; None compares all images.

        Raises:
            ValueError: If the query, the condition or a number is not valid, or the model has no text tower.
            RefusedImageError: If the image cannot be read.
        """
        check_at_least("k", k, 1)
        if probes is not None:
            check_at_least("probes", probes, 1)
        vector = self.embed(query)
        if not len(self):
            return []
        rows = self._table.nearest(vector, k, where, probes)
        return [Hit(*(row[name] for name in Hit._fields)) for row in rows]

    def embed(self, query: Query) -> NDArray[np.float32]:
        """Return the unit vector (D,) of a query, see `search`."""
        if isinstance(query, np.ndarray):
            vector = np.asarray(query, dtype=np.float32)
            shape = (self._table.dim,)
            require(vector.shape == shape, "query", f"have the shape {shape}", vector.shape, "Give one vector")
            require(bool(np.isfinite(vector).all()), "query", "be finite", "NaN or infinity", "Check the vector")
        elif isinstance(query, str):
            vector = self.model_for("words").embed_texts([query])[0]
        else:
            embedder = self.model_for("images")
            image: Any = query
            if isinstance(query, Path):
                image = decode_image(query.read_bytes(), size=embedder.size, max_pixels=FILE_PIXELS)
            elif isinstance(query, bytes):
                image = decode_image(query, size=embedder.size)
            if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
                got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                fail("query", "be words, an image or a vector", got, "Give pixels (3, H, W), uint8", TypeError)
            vector = embedder.embed_images([image])[0]
        unit: NDArray[np.float32] = _unit(vector[None])[0]
        return unit

    def near_duplicates(self, threshold: float = 0.95) -> list[tuple[list[str], float]]:
        """Return groups of images that are nearly the same for the model, largest group first.

        Args:
            threshold: Lowest cosine of a linked pair, in (-1, 1]; what counts as nearly the same depends on the model.

        Returns:
            The paths of each group, and the lowest cosine of two of its images, which may be below the threshold.
        """
        paths, vectors = self.stored_vectors()
        groups: list[Duplicates] = group_duplicates(vectors, threshold)
        return [([paths[row] for row in group.rows], group.lowest) for group in groups]

    def stored_vectors(self) -> tuple[list[str], Tensor]:
        """Return the paths of all images, sorted, and their unit rows (N, D), float32."""
        return self._table.vectors()

    def folders(self) -> dict[str, int]:
        """Return the number of images by folder, sorted."""
        (found,) = self._table.columns("folder").values()
        return dict(sorted(Counter(found).items()))

    def path_of(self, digest: str) -> Path | None:
        """Return the path of a file with this digest of its content that is in the index, or None."""
        found = self._table.columns("path", where=f"digest = {quoted(digest)}")["path"]
        return self.folder / found[0] if found else None

    def build_index(self, lists: int | None = None) -> None:
        """Build inverted lists for approximate search with ``probes``; `update` adds later images to them.

        Args:
            lists: Number of lists; None for about the root of the number of images.

        Raises:
            ValueError: If there are fewer than 256 images, for which a search of all is faster.
            RuntimeError: If another process is writing to the index.
        """
        least = 256
        require(len(self) >= least, "images", f"be {least} or more", len(self), "Search without an index")
        count = lists if lists is not None else round(len(self) ** 0.5)
        check_at_least("lists", count, 1)
        with self._table.writing():
            self._table.build_index(num_partitions=count)

    def size_on_disk(self) -> int:
        """Return the bytes of the store."""
        return self._table.size_on_disk()

    def model_for(self, what: str) -> Embedder:
        """Return the model, or raise a ValueError that names what needs it."""
        if self.embedder is None:
            fail("model", f"be given for {what}", None, "Open the index with its model")
        return self.embedder

    def _find(self) -> list[str]:
        """Return the paths of the images, relative to the folder, sorted."""
        found = find_images(self.folder, EXTENSIONS, deep=True) if self.folder.is_dir() else {}
        return sorted(Path(path).relative_to(self.folder).as_posix() for path in found.values())

    def _pending(
        self, paths: Sequence[str], known: dict[str, list[Any]], verify: bool, done: IndexUpdate
    ) -> Iterator[str]:
        """Yield the paths of new and changed files."""
        for path in paths:
            if path not in known:
                yield path
                continue
            size, changed_ns, digest = known[path]
            try:
                stat, content = (self.folder / path).stat(), (self.folder / path).read_bytes() if verify else b""
            except OSError:  # the reason is found where it is read
                yield path
                continue
            same = (
                content_digest(content) == digest if verify else (stat.st_size, stat.st_mtime_ns) == (size, changed_ns)
            )
            if same:
                done.unchanged += 1
            else:
                yield path

    def _embed(
        self, embedder: Embedder, paths: Sequence[str], known: dict[str, list[Any]], done: IndexUpdate
    ) -> list[str]:
        """Commit the vectors of files, and return the paths of stored ones that cannot be read any more."""
        rows: list[dict[str, Any]] = []
        images, lost = [], []
        for path in paths:
            file = self.folder / path
            try:
                path.encode()
                stat, data = file.stat(), file.read_bytes()  # a change in between is found by the next update
                pixels = decode_image(data, size=embedder.size, max_pixels=FILE_PIXELS)
            except (OSError, RefusedImageError, UnicodeEncodeError) as error:
                done.unreadable[path.encode(errors="replace").decode()] = str(error)
                lost += [path] if path in known else []
                continue
            facts = {"bytes": stat.st_size, "changed_ns": stat.st_mtime_ns, "digest": content_digest(data)}
            shape = {"height": pixels.shape[1], "width": pixels.shape[2]}
            rows.append({"path": path, "folder": Path(path).parent.as_posix()} | facts | shape)
            images.append(embedder.prepare(pixels))
        if rows:
            vectors = embedder.embed_prepared(images)
            zero: list[bool] = (vectors == 0).all(axis=1).tolist()
            for row in (row for row, is_zero in zip(rows, zero, strict=True) if is_zero):
                done.unreadable[row["path"]] = "The model's output is a vector of zeros."
                lost += [row["path"]] if row["path"] in known else []
            rows = [row for row, is_zero in zip(rows, zero, strict=True) if not is_zero]
            replace = any(row["path"] in known for row in rows)
            if rows:
                self._table.put(rows, _unit(vectors[np.logical_not(zero)]), replace=replace)
        for row in rows:
            (done.changed if row["path"] in known else done.added).append(row["path"])
        return lost


def content_digest(data: bytes) -> str:
    """Return the digest of the content of a file, 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows (B, D) of unit length.

    Raises:
        ValueError: If a row is 0.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    hint = "The cosine to a vector of zeros is not defined; check the model"
    require(bool((lengths > 0).all()), "vectors", "not be 0", "a vector of zeros", hint)
    unit: NDArray[np.float32] = (vectors / lengths).astype(np.float32)
    return unit
