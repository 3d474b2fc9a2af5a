"""Batches of aligned items: two of any kind, or several modalities by name, of which a batch may lack some."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch, fail, require
from lightning_contrast.contracts import IMAGE_KEY, split_batch
from lightning_contrast.sharding import is_fsdp1_shard


def check_keys(keys: Sequence[str] | None) -> tuple[str, str] | None:
    """Return the two keys of a dict batch, or None, after checking them.

    Raises:
        ValueError: If they are not two different keys.
    """
    if keys is None:
        return None
    ok = isinstance(keys, list | tuple) and len(keys) == 2 and keys[0] != keys[1]
    require(ok, "keys", "be two different keys of the batch", keys, 'For example ("image", "depth")')
    return keys[0], keys[1]


def require_pair(batch: Any, keys: tuple[str, str] | None) -> tuple[Any, Any]:
    """Return the two items of a training batch, each with B rows.

    Args:
        batch: ``(a, b)`` as floating tensors ``(B, ...)``, ``([a, b], ...)``, a dict with two views as ``"image"``, or
            with ``keys`` a dict that holds each item under its key.
        keys: See ``batch``.

    Raises:
        TypeError: If there are ``keys`` and the batch is no dict.
        ValueError: If an item is missing, or the two have different numbers of rows.
    """
    a, b = _views(batch) if keys is None else _entries(batch, keys)
    sizes = len(a), len(b)
    hint = "Yield one row of each item per pair, in the same order"
    require(sizes[0] == sizes[1], "batch", "hold as many items a as items b", sizes, hint)
    check_batch("batch", sizes[0], 1 if distributed.is_distributed() else 2)
    return a, b


def _entries(batch: Any, keys: tuple[str, str]) -> tuple[Any, Any]:
    if not isinstance(batch, Mapping):
        hint = "Yield a dict from the loader, or leave `keys` out"
        fail("batch", f"be a dict with {keys[0]!r} and {keys[1]!r}", type(batch).__name__, hint, TypeError)
    missing = [key for key in keys if batch.get(key) is None]
    hint = "PairContrast needs both items in each batch; filter the incomplete pairs in the dataset"
    require(not missing, "batch", f"hold {keys[0]!r} and {keys[1]!r}", f"no {', '.join(map(repr, missing))}", hint)
    return batch[keys[0]], batch[keys[1]]


def _views(batch: Any) -> tuple[Tensor, Tensor]:
    views: Any = batch
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], list | tuple):
        views = batch[0]  # ([a, b], labels, ...)
    elif not isinstance(batch, list | tuple):
        views, _ = split_batch(batch)
    is_pair = isinstance(views, list | tuple) and len(views) == 2
    is_pair = is_pair and all(isinstance(item, Tensor) and item.ndim > 1 for item in views)
    is_pair = is_pair and all(item.is_floating_point() for item in views)
    if not is_pair:
        got = [str(getattr(item, "dtype", type(item).__name__)) for item in views] if len(views) < 9 else len(views)
        hint = "Yield (a, b), ([a, b], labels), or a dict and name `keys`; `data.GroupPairs` makes pairs by label"
        fail("batch", "hold two items as floating tensors", got, hint)
    return views[0], views[1]


def require_modalities(
    batch: Any, names: Sequence[str], anchor: str, device: torch.device
) -> tuple[dict[str, Any], dict[str, Sequence[bool]]]:
    """Return the modalities of a training batch, and which ranks hold those that any rank has.

    Args:
        batch: A dict with modalities ``(B, ...)`` by name, or a sequence of them in the order of ``names`` (also as its
            first entry); a modality that is left out or None is absent. A list under "image", which is not one of
            them, holds the first of ``names``.
        names: All modalities.
        anchor: The one that no batch may lack.
        device: Device on which the process group communicates.

    Returns:
        The modalities of this rank; and for each but the anchor that a rank has, in the order of ``names``, whether
        each rank has it, which is the same on all ranks.

    Raises:
        ValueError: If the anchor or all other modalities are missing, which all ranks raise together; or if the rows of
            a modality are not as many as those of the anchor.
    """
    found = _by_name(batch, names)
    table = [[name in found for name in names]]
    if distributed.is_distributed():
        table = distributed.gather(torch.tensor(table, device=device)).tolist()
    ranks = dict(zip(names, zip(*table, strict=True), strict=True))
    held = [name for name in names if any(ranks[name])]
    require(all(ranks[anchor]), "batch", f"hold the anchor {anchor!r}", held, "Each pair needs it, on each rank")
    hint = f"Yield {anchor!r} with at least one other modality"
    require(len(held) > 1, "batch", f"hold a modality besides {anchor!r}", held, hint)
    sizes = {name: len(item) for name, item in found.items()}
    hint = "Yield one row of each modality per sample; leave a modality out of the whole batch if rows lack it"
    require(len(set(sizes.values())) == 1, "batch", "hold as many rows of each modality", sizes, hint)
    check_batch("batch", sizes[anchor], 1 if distributed.is_distributed() else 2)
    return found, {name: ranks[name] for name in held if name != anchor}


def check_absence(ranks: Mapping[str, Sequence[bool]], module: nn.Module) -> None:
    """Refuse a modality that only some ranks have if networks communicate in their forward pass.

    Args:
        ranks: For each modality, whether each rank has it.
        module: The method with its networks.

    Raises:
        ValueError: If it has SyncBatchNorm or is sharded by FSDP; on all ranks, which would wait for each other.
    """
    partly = {name: [*present] for name, present in ranks.items() if len(set(present)) > 1}
    if partly:
        waits = any(isinstance(child, nn.SyncBatchNorm | FSDPModule) for child in module.modules())
        waits = waits or any(map(is_fsdp1_shard, module.parameters()))
        hint = "Let all ranks read the same dataset in a step, or use neither SyncBatchNorm nor FSDP"
        require(not waits, "batch", "hold the same modalities on all ranks", partly, hint)


def no_rows(like: Tensor, *networks: nn.Module) -> Tensor:
    """Return an embedding without rows, from which all parameters of networks get a gradient of zeros.

    So a rank that lacks a modality takes part in the reductions of the others.

    Args:
        like: Embeddings (B, D) of the same width and type.
        *networks: The networks of the modality.

    Returns:
        A tensor (0, D).
    """
    weights = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
    zeros = [weight.reshape(-1)[:0].sum() for weight in weights]  # of no elements, so that a NaN does not spread
    return like.new_zeros(0, like.shape[1]) + sum(zeros)


def _by_name(batch: Any, names: Sequence[str]) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        found = {name: batch[name] for name in names if batch.get(name) is not None}
        views = batch.get(IMAGE_KEY) if IMAGE_KEY not in names else None
        if not isinstance(views, list | tuple):
            return found
        first = names[: len(views)]
        hint = "Yield each modality once: by its name, or in the list of images in the order of `encoders`"
        ok = len(views) <= len(names) and not found.keys() & set(first)
        require(
            ok, "batch", f"hold modalities in {IMAGE_KEY!r} that it does not name", f"{len(views)}, {[*found]}", hint
        )
        return dict(zip(first, views, strict=True)) | found
    nested = isinstance(batch, list | tuple) and len(batch) > 0 and isinstance(batch[0], list | tuple)
    views = batch[0] if nested else batch
    ok = isinstance(views, list | tuple) and len(views) == len(names)
    got = len(views) if isinstance(views, list | tuple) else type(views).__name__
    hint = "Yield a dict by modality, or a list in the order of `encoders`"
    require(ok, "batch", f"hold the modalities {', '.join(names)}", got, hint)
    return {name: item for name, item in zip(names, views, strict=True) if item is not None}
