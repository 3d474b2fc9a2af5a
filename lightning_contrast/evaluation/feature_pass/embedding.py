"""Embedding of a set: features, labels and paths as parquet shards, resumed by shard, by any number of workers."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.callbacks.capture.dataloaders import like
from lightning_contrast.callbacks.capture.sampling import SEED, drawn_rows, is_map_style
from lightning_contrast.contracts import batch_labels
from lightning_contrast.distributed import is_distributed, rank, world_size
from lightning_contrast.evaluation.feature_pass.cache import features_of, pass_key, row_shards, shared
from lightning_contrast.evaluation.feature_pass.fingerprint import row_paths
from lightning_contrast.evaluation.feature_pass.replacing import replaced
from lightning_contrast.evaluation.feature_pass.subjects import Preprocess, Subject, load_subject
from lightning_contrast.metrics.zero_shot import eval_mode
from lightning_contrast.seeding import derived_seed, isolated

MANIFEST = "_manifest.json"
"""Name of the list of shards; pyarrow leaves files out whose names begin with "_"."""
_KEY = "_key.json"
_DIGEST = b"digest"
_EXTRA = "pip install 'lightning_contrast[embed]'"


@dataclass(frozen=True)
class EmbeddingJob:
    """The work on one set: what every worker needs to write any of its shards.

    Attributes:
        subject: The network and its preprocessing.
        loader: The loader of the set.
        shards: Rows of each shard.
        folder: Folder of the shards.
        identity: Digest of weights, data, preprocessing and layout.
    """

    subject: Subject
    loader: DataLoader[Any]
    shards: list[list[int]]
    folder: Path
    identity: str

    def write(self, index: int) -> dict[str, Any]:
        """Write a shard unless it is there and intact.

        The file is written under another name and renamed, so that it is whole or not there.

        Args:
            index: Number of the shard, from 0.

        Returns:
            Its entry in the manifest.
        """
        path = self.folder / f"shard-{index:05d}.parquet"
        if (found := _read(path, index, self.identity)) is not None:
            return found[0]
        rows, features, labels = self.shards[index], [], []
        with eval_mode(self.subject.module), isolated(derived_seed(SEED, index)):  # transforms do not depend on workers
            for batch in like(self.loader, rows, drop_last=False):
                outputs = features_of(self.subject, batch)
                known = batch_labels(batch)
                whole = known is not None and known.shape == (len(outputs),) and not known.is_floating_point()
                features.append(outputs.numpy())
                labels.append(known.cpu().numpy().astype(np.int64) if known is not None and whole else None)
        columns = np.concatenate(features)
        require(len(columns) == len(rows), "loader", f"yield {len(rows)} rows", len(columns), "Do not skip images")
        classes = [part for part in labels if part is not None]
        known_labels = np.concatenate(classes) if len(classes) == len(labels) else None
        _write_parquet(path, rows, columns, known_labels, row_paths(self.loader.dataset, rows), self.identity, index)
        written = _read(path, index, self.identity)
        if written is None:
            fail("folder", "keep what is written", str(path), "Check the disk")
        return written[0]

    def finish(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write the manifest, after all shards."""
        key = json.loads((self.folder / _KEY).read_text(encoding="utf-8"))
        shards = sorted(entries, key=lambda entry: int(entry["shard"]))
        _write_json(self.folder / MANIFEST, {**key, "shards": list(shards)})


def embed_dataset(
    model: str | Path | nn.Module | Subject,
    loader: DataLoader[Any],
    folder: str | Path,
    *,
    preprocess: Preprocess | None = None,
    shard_size: int = 4096,
    ray_workers: int = 0,
    progress: bool = True,
) -> Path:
    """Write the features of all rows that a loader draws as parquet shards, with labels and paths.

    Columns: ``id`` (int64, the row of the dataset), ``path`` (string; null if the dataset names no files), ``label``
    (int64; null without classes) and ``feature`` (list of F float32). Rows are read once each, in the order of the
    dataset, without shuffling and without ``drop_last``. ``_manifest.json`` is written last: what was embedded (digests
    of model, data and preprocessing), and per shard its file, number of rows and digest.
    ``pyarrow.parquet.read_table(folder)`` reads all shards; `read_embeddings` checks them too.

    A pass that was killed resumes after its whole shards. With a process group the ranks share the shards; with
    ``ray_workers`` the actors of Ray Data do, on all machines of the cluster, which must see the folder. In each case a
    shard is computed in the same batches by one process, so that the vectors are the same on equal machines. Needs the
    extra: ``pip install 'lightning_contrast[embed]'``.

    Args:
        model: See `load_subject`.
        loader: A DataLoader over a dataset whose rows are read by index. Its batches follow the batch contract.
        folder: Folder of the shards; it is created. One that holds another embedding is refused.
        preprocess: See `load_subject`.
        shard_size: Rows per file, >= 1; rounded up to whole batches of the loader.
        ray_workers: Number of Ray actors; 0 computes in this process or process group.
        progress: Show a progress bar, on rank 0 and in a terminal; Ray has its own.

    Returns:
        The folder.

    Raises:
        TypeError: If ``loader`` is not such a DataLoader, or its batches have no images.
        ValueError: If the features are not ``(B, F)`` or not finite, a batch holds views, there are no rows, or the
            folder holds another embedding.
        ModuleNotFoundError: If an extra is not installed.
        OSError: If the folder cannot be written.

    Example:
        >>> data = lc.data.EmojiDataModule()
        >>> embed_dataset("model.ckpt", data.test_dataloader(), "vectors")  # doctest: +SKIP
        PosixPath('vectors')
    """
    check_at_least("shard_size", shard_size, 1)
    check_at_least("ray_workers", ray_workers, 0)
    _require_pyarrow()
    if not is_map_style(loader):
        hint = "Give a DataLoader over a dataset with a length"
        fail("loader", "be a DataLoader whose rows are read by index", type(loader).__name__, hint, TypeError)
    hint = "Use one of the two: start one process, or leave `ray_workers` at 0"
    require(ray_workers == 0 or world_size() == 1, "ray_workers", "be 0 in a process group", ray_workers, hint)
    subject = load_subject(model, preprocess)
    rows = drawn_rows(loader)
    require(len(rows) > 0, "loader", "draw at least one row", 0, "Check its dataset")
    target = Path(folder)
    with eval_mode(subject.module), isolated(derived_seed(SEED)):
        key = shared(lambda: _prepare(target, pass_key(subject, loader, rows, shard_size)))
    job = EmbeddingJob(subject, loader, row_shards(loader, rows, shard_size), target, key["folder"])
    if ray_workers > 0:
        from lightning_contrast.evaluation.feature_pass.on_ray import write_on_ray

        job.finish(write_on_ray(job, ray_workers))
        return target
    from tqdm import tqdm

    own = range(rank(), len(job.shards), world_size())
    quiet = None if progress and rank() == 0 else True  # None: only in a terminal
    entries = [job.write(index) for index in tqdm(own, desc="shards", disable=quiet, leave=False)]
    if is_distributed():
        gathered: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(gathered, entries)
        entries = [entry for part in gathered for entry in part]
    if rank() == 0:
        job.finish(entries)
    if is_distributed():
        torch.distributed.barrier()
    return target


def read_embeddings(folder: str | Path) -> Any:
    """Return the rows of all shards as one pyarrow Table, after comparing each shard with the manifest.

    Args:
        folder: Folder of `embed_dataset`.

    Raises:
        FileNotFoundError: If it has no manifest: the pass did not end.
        ValueError: If a shard is missing or damaged.
        ModuleNotFoundError: If the extra is not installed.
    """
    _require_pyarrow()
    import pyarrow
    import pyarrow.parquet

    target = Path(folder)
    if not (target / MANIFEST).exists():
        hint = "Run the embedding again; it resumes"
        fail("folder", f"hold a whole embedding with {MANIFEST}", str(folder), hint, FileNotFoundError)
    manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    tables = []
    for entry in manifest["shards"]:
        found = _read(target / entry["file"], entry["shard"], manifest["folder"])
        if found is None or found[0] != entry:
            fail("folder", "hold the shards of its manifest", entry["file"], "Run the embedding again; it resumes")
        tables.append(found[1])
    return pyarrow.concat_tables(tables)


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(f"Parquet files need pyarrow: {_EXTRA}.") from error


def _prepare(folder: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Create the folder with a note on what it holds, or check that its note is the same."""
    note = folder / _KEY
    if note.exists():
        held = json.loads(note.read_text(encoding="utf-8"))
        other = [name for name in key if name != "folder" and held.get(name) != key[name]]
        hint = "Give an empty folder, or the model, data and sizes that it was begun with"
        require(not other, "folder", "hold the same embedding", f"{folder} with other {', '.join(other)}", hint)
        return key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(note, key)
    except OSError as error:
        raise OSError(error.errno, f"Cannot write embeddings to {folder}: {error.strerror or error}") from error
    return key


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with replaced(path) as part:
        part.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _write_parquet(
    path: Path,
    rows: Sequence[int],
    features: "np.ndarray[Any, Any]",
    labels: "np.ndarray[Any, Any] | None",
    paths: Sequence[str] | None,
    identity: str,
    index: int,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    width = features.shape[1]
    flat = pa.array(np.ascontiguousarray(features, dtype=np.float32).reshape(-1))
    table = pa.table(
        {
            "id": pa.array(list(rows), pa.int64()),
            "path": pa.array(list(paths) if paths is not None else [None] * len(rows), pa.string()),
            "label": pa.array(labels.tolist() if labels is not None else [None] * len(rows), pa.int64()),
            "feature": pa.FixedSizeListArray.from_arrays(flat, width),
        }
    )
    table = table.replace_schema_metadata({_DIGEST: _digest(table, identity, index).encode()})
    with replaced(path) as part:
        pyarrow.parquet.write_table(table, part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())


def _digest(table: Any, identity: str, index: int) -> str:
    """Return a digest of the values of a shard, of what was embedded, and of its number."""
    found = hashlib.blake2b(f"{identity} {index} {table.num_rows}".encode(), digest_size=16)
    found.update(json.dumps([table.column(name).to_pylist() for name in ("id", "path", "label")]).encode())
    values = table.column("feature").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


def _read(path: Path, index: int, identity: str) -> tuple[dict[str, Any], Any] | None:
    """Return the entry of a shard in the manifest and its table; None if it is missing, damaged or another one."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        held = (table.schema.metadata or {}).get(_DIGEST, b"").decode()
        if held != _digest(table, identity, index):
            return None
    except (pa.ArrowException, OSError, KeyError):
        return None
    return {"shard": index, "file": path.name, "rows": table.num_rows, "digest": held}, table
