"""Digests of models and data, by which cached features are found again."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset

from lightning_contrast.nn.frozen_teacher import weights_digest

SAMPLES = 8
"""Items of a dataset whose content is part of its digest."""


def digest(*parts: object) -> str:
    """Return a digest of 32 characters of values that JSON can hold.

    Args:
        *parts: Numbers, strings, lists and dicts.
    """
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return a digest of the dtype, shape and content of a tensor ``(...)``."""
    found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def model_digest(module: nn.Module, outputs: Tensor) -> str:
    """Return a digest of a network: its weights, its text form, and features of a few images.

    Args:
        module: The network.
        outputs: Its features of the first images of the set, ``(n, F)``; they tell networks without weights, and
            preprocessings, apart. Compared in half precision.
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return digest(weights_digest(module), kind, repr(module), tensor_digest(outputs.half()))


def data_digest(dataset: Any, rows: Sequence[int]) -> str:
    """Return a digest of rows of a dataset.

    Images in memory (tensors in the attributes ``images``, ``data`` or ``tensors``) are read in full. Of files, the
    paths, sizes and times of change are read. In addition, and alone for any other dataset, the content of some items.

    Args:
        dataset: A dataset whose items are read by index.
        rows: The rows, >= 1.
    """
    whole = len(rows) == len(dataset) and list(rows) == list(range(len(dataset)))
    parts: list[object] = [type(dataset).__qualname__, len(rows), "all" if whole else digest(*rows)]
    owner = dataset
    while isinstance(owner, Subset):
        parts.append(digest(*owner.indices))
        owner = owner.dataset
    parts += [tensor_digest(found) for found in _tensors(owner)]
    parts += [_file_digest(owner)]
    step = max(1, len(rows) // SAMPLES)
    for row in list(rows)[::step][:SAMPLES]:
        leaves = tree_leaves(dataset[row])
        parts += [tensor_digest(leaf) if isinstance(leaf, Tensor) else _plain(leaf) for leaf in leaves]
    return digest(*parts)


def row_paths(dataset: Any, rows: Sequence[int]) -> list[str] | None:
    """Return the files of rows of a dataset, or None if it does not name files as ``paths`` or ``samples``.

    Args:
        dataset: Any dataset, or a `Subset` of one.
        rows: Rows of the dataset.
    """
    while isinstance(dataset, Subset):
        rows = [dataset.indices[row] for row in rows]
        dataset = dataset.dataset
    paths, samples = getattr(dataset, "paths", None), getattr(dataset, "samples", None)
    if isinstance(paths, Sequence):
        return [str(paths[row]) for row in rows]
    return [str(samples[row][0]) for row in rows] if isinstance(samples, Sequence) else None


def _plain(value: Any) -> str:
    """Return a text form of a value that is not a tensor; of a picture, a digest of its pixels."""
    pixels = getattr(value, "tobytes", None)
    return hashlib.blake2b(pixels(), digest_size=16).hexdigest() if callable(pixels) else repr(value)


def _tensors(dataset: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for name in ("images", "data", "tensors", "labels", "targets"):
        value = getattr(dataset, name, None)
        values = value if isinstance(value, tuple | list) else [value]
        found += [item for item in values if isinstance(item, Tensor)]
        if hasattr(value, "__array__") and not isinstance(value, Tensor):
            found.append(torch.as_tensor(value))
    return found


def _file_digest(dataset: Any) -> str:
    """Return a digest of the files that a dataset names as ``paths`` or, as torchvision's folders, ``samples``."""
    paths, samples = getattr(dataset, "paths", None), getattr(dataset, "samples", None)
    if not isinstance(paths, Sequence):
        paths = [sample[0] for sample in samples] if isinstance(samples, Sequence) else []
    stats = []
    for path in map(Path, paths):
        if path.is_file():
            state = path.stat()
            stats.append([str(path), state.st_size, state.st_mtime_ns])
    return digest(stats)
