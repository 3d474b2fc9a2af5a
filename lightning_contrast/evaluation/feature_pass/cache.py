"""One pass of a frozen network over a set, kept on disk in shards and resumed where it stopped."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.callbacks.capture.dataloaders import like
from lightning_contrast.callbacks.capture.sampling import SEED, drawn_rows, is_map_style
from lightning_contrast.checkpoints import AtomicCheckpointIO, check_checkpoint, load_checkpoint
from lightning_contrast.contracts import IMAGE_KEY, INDEX_KEY, LABEL_KEY, TEXT_KEY, batch_labels, split_batch
from lightning_contrast.distributed import is_distributed, rank, world_size
from lightning_contrast.evaluation.feature_pass.fingerprint import data_digest, digest, model_digest
from lightning_contrast.evaluation.feature_pass.replacing import replaced
from lightning_contrast.evaluation.feature_pass.subjects import Preprocess, Subject, load_subject
from lightning_contrast.metrics.zero_shot import eval_mode
from lightning_contrast.seeding import derived_seed, isolated

_PROBED = 4  # images whose features are part of the digest of a model


class FeatureSet(NamedTuple):
    """Features of a set in the order of its rows.

    Attributes:
        features: ``(N, F)``, float32, on the CPU.
        labels: ``(N,)`` integers, or as the loader has them; None if it has none.
        columns: Other tensors ``(N,)`` of a loader that yields dicts, by key, such as groups.
    """

    features: Tensor
    labels: Tensor | None
    columns: dict[str, Tensor]


def cached_features(
    model: str | Path | nn.Module | Subject,
    loader: DataLoader[Any],
    *,
    folder: str | Path,
    preprocess: Preprocess | None = None,
    shard_size: int = 4096,
    progress: bool = True,
) -> FeatureSet:
    """Return the features of all rows that a loader draws, computed once in eval mode and kept on disk.

    Rows are read once each, in the order of the dataset, without shuffling and without ``drop_last``. They are written
    in shards to a subfolder of ``folder`` that is named by a digest of the weights, the data and the preprocessing, so
    changed ones are computed again. A pass that was killed resumes after its last whole shard. With a process group,
    the ranks share the shards, and all return all rows; each batch is computed as one process computes it.

    Args:
        model: See `load_subject`.
        loader: A DataLoader over a dataset whose rows are read by index. Its batches follow the batch contract.
        folder: Folder of all cached features; on several machines, one that all see.
        preprocess: See `load_subject`.
        shard_size: Rows per file, >= 1; rounded up to whole batches of the loader.
        progress: Show a progress bar, on rank 0 and in a terminal.

    Raises:
        TypeError: If ``loader`` is not such a DataLoader, or its batches have no images.
        ValueError: If the features are not ``(B, F)`` or not finite, a batch holds views, or there are no rows.
        OSError: If the folder cannot be written.

    Example:
        >>> data = lc.data.EmojiDataModule()
        >>> found = cached_features("model.ckpt", data.test_dataloader(), folder="features")  # doctest: +SKIP
    """
    check_at_least("shard_size", shard_size, 1)
    if not is_map_style(loader):
        hint = "Give a DataLoader over a dataset with a length"
        fail("loader", "be a DataLoader whose rows are read by index", type(loader).__name__, hint, TypeError)
    subject = load_subject(model, preprocess)
    rows = drawn_rows(loader)
    require(len(rows) > 0, "loader", "draw at least one row", 0, "Check its dataset")
    with eval_mode(subject.module), isolated(derived_seed(SEED)):
        key = shared(lambda: pass_key(subject, loader, rows, shard_size))
        target = Path(folder) / key["folder"]
        if rank() == 0:
            _prepare(target, key)
        shards = row_shards(loader, rows, shard_size)
        _write(subject, loader, shards, target, progress=progress)
    if is_distributed():
        torch.distributed.barrier()
    missing = [index for index in range(len(shards)) if not _path(target, index).exists()]
    require(not missing, "folder", "be seen by all ranks", str(folder), "Use a folder on a shared disk")
    return _joined([load_checkpoint(_path(target, index)) for index in range(len(shards))])


def features_of(subject: Subject, batch: Any) -> Tensor:
    """Return the features of a batch, ``(B, F)``, float32, on the CPU.

    Args:
        subject: The network, which is in eval mode.
        batch: A batch by the batch contract.

    Raises:
        ValueError: If the batch holds views, or the features are not ``(B, F)`` or not finite.
    """
    images, _ = split_batch(batch)
    if not isinstance(images, Tensor):
        hint = "Give a loader without views, such as that of the validation"
        fail("loader", "yield one tensor of images per batch", f"{len(images)} views", hint)
    parameter = next(subject.module.parameters(), None)
    device = images.device if parameter is None else parameter.device
    with torch.no_grad():
        found = subject.module(subject.preprocess(images.to(device)))
    name = type(subject.module).__name__
    hint = 'Wrap the network by `nn.build_backbone(..., tokens="mean")`, or in a module that returns (B, F)'
    if not isinstance(found, Tensor):
        fail("model", f"return features (B, F) ({name} does not)", type(found).__name__, hint, TypeError)
    fits = found.ndim == 2 and len(found) == len(images)
    require(fits, "model", f"return features (B, F) ({name} does not)", tuple(found.shape), hint)
    found = found.float().cpu()
    finite = bool(found.isfinite().all())
    require(finite, "model", f"return finite features ({name} does not)", "NaN or infinity", "Check its weights")
    return found


def write_file(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint that other processes may be writing as well, each under its own name until it is complete.

    Args:
        content: As for `torch.save`.
        path: Path of the file; an existing one is replaced.

    Raises:
        OSError: If it cannot be written.
    """
    with replaced(path) as own:
        AtomicCheckpointIO().save_checkpoint(content, own)


def pass_key(subject: Subject, loader: DataLoader[Any], rows: list[int], shard_size: int) -> dict[str, Any]:
    """Return what the features depend on, and as "folder" a digest of it; the network is in eval mode."""
    probe = next(iter(like(loader, rows[:_PROBED], drop_last=False)))
    outputs = features_of(subject, probe)
    parts = {
        "model": model_digest(subject.module, outputs),
        "data": data_digest(loader.dataset, rows),
        "input": digest(subject.input_spec),
        "rows": len(rows),
        "batch_size": like(loader, rows, drop_last=False).batch_size,
        "shard_size": shard_size,
    }
    return parts | {"folder": digest(parts)}


def shared(make: Any) -> Any:
    """Return what rank 0 makes, on all ranks; an error of rank 0 is raised on all."""
    if not is_distributed():
        return make()
    found: list[Any] = [None]
    if rank() == 0:
        try:
            found = [make()]
        except (TypeError, ValueError, OSError) as error:
            found = [error]
    torch.distributed.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _prepare(target: Path, key: Mapping[str, Any]) -> None:
    """Create the folder with a note on what is in it."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        with replaced(target / "features.json") as part:
            part.write_text(json.dumps(key, indent=1), encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, f"Cannot write features to {target}: {error.strerror or error}") from error


def row_shards(loader: DataLoader[Any], rows: list[int], shard_size: int) -> list[list[int]]:
    """Return the rows of each shard, whole batches of the loader."""
    batch = like(loader, rows, drop_last=False).batch_size or 1
    size = -(-shard_size // batch) * batch
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _write(subject: Subject, loader: DataLoader[Any], shards: list[list[int]], target: Path, *, progress: bool) -> None:
    """Compute this rank's shards that are not there, and write them one by one."""
    from tqdm import tqdm

    own = range(rank(), len(shards), world_size())
    total = sum(len(shards[index]) for index in own)
    quiet = None if progress and rank() == 0 else True  # None: only in a terminal
    with tqdm(total=total, desc="features", unit="image", disable=quiet, leave=False) as bar:
        for index in own:
            path = _path(target, index)
            if not _intact(path):
                parts = []
                with isolated(derived_seed(SEED, index)):  # random transforms do not depend on the ranks
                    for batch in _batches(loader, shards[index]):
                        parts.append(_columns(subject, batch))
                        bar.update(len(parts[-1]["features"]))
                write_file(_stacked(parts), path)
            else:
                bar.update(len(shards[index]))


def _batches(loader: DataLoader[Any], rows: list[int]) -> Iterator[Any]:
    return iter(like(loader, rows, drop_last=False))


def _columns(subject: Subject, batch: Any) -> dict[str, Tensor]:
    """Return the features, labels and other columns of a batch, each with one row per image."""
    features = features_of(subject, batch)
    found = {"features": features}
    labels = batch_labels(batch)
    if labels is not None and len(labels) == len(features):
        found["labels"] = labels.cpu()
    if isinstance(batch, Mapping):
        for name, value in batch.items():
            other = name not in (IMAGE_KEY, LABEL_KEY, INDEX_KEY, TEXT_KEY) and isinstance(value, Tensor)
            if other and value.shape == (len(features),):
                found[f"column/{name}"] = value.cpu()
    return found


def _stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def _joined(parts: list[dict[str, Tensor]]) -> FeatureSet:
    found = _stacked(parts)
    columns = {name.removeprefix("column/"): value for name, value in found.items() if name.startswith("column/")}
    return FeatureSet(found["features"], found.get("labels"), columns)


def _path(target: Path, index: int) -> Path:
    return target / f"shard-{index:05d}.pt"


def _intact(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        check_checkpoint(path)
    except (ValueError, OSError):
        return False
    return True
