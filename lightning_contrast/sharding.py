"""Norms of whole tensors from the shards of this rank, and the trust ratios made of them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

_Groups: TypeAlias = tuple[Any, ...]


def local(tensor: Tensor) -> Tensor:
    """Return the shard of this rank of a DTensor (sharing its memory), and any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def local_gradient(weight: Tensor) -> Tensor:
    """Return the gradient of this rank's shard of ``weight``, whose ``grad`` is not None."""
    gradient = weight.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise ValueError("Gradients must be dense for LARS, got a sparse one. Build the embedding with sparse=False.")
    sharded: Any = gradient
    placements = getattr(weight, "placements", None)
    if placements is not None and sharded.placements != placements:
        sharded = sharded.redistribute(placements=placements)
    return local(sharded)


def is_fsdp1_shard(weight: Tensor) -> bool:
    """Tell whether FSDP1 has made ``weight`` a view of its flat shard, with ``use_orig_params=True``.

    Such a view may be empty, and then it has no gradient, on ranks that hold no part of the tensor.
    """
    return bool(getattr(weight, "_fsdp_flattened", False))


def trust_ratios(
    weights: list[Tensor], updates: list[Tensor], rule: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Return one trust ratio for each weight, as scalars on its device.

    Args:
        weights: The parameters.
        updates: This rank's shard of each gradient, empty where it has none.
        rule: Maps the norms ``(n,)`` of weights and of updates to ratios ``(n,)``.
    """
    buckets: dict[tuple[torch.device, torch.dtype, _Groups], list[int]] = {}
    for i, weight in enumerate(weights):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        buckets.setdefault((weight.device, dtype, shard_groups(weight)), []).append(i)
    ratios: list[Tensor] = [*updates]
    for (_, dtype, groups), members in buckets.items():
        norms = norms_over_ranks([local(weights[i]) for i in members] + [updates[i] for i in members], groups, dtype)
        for i, ratio in zip(members, rule(*norms.chunk(2)).unbind(), strict=True):
            ratios[i] = ratio
    return ratios


def norms_over_ranks(shards: list[Tensor], groups: _Groups, dtype: torch.dtype) -> Tensor:
    """Return the 2-norms ``(n,)`` of whole tensors of which each rank holds a shard; nothing is read on the host.

    Args:
        shards: This rank's shard of each tensor; all lie on one device.
        groups: From `shard_groups`; empty where a shard is the whole tensor.
        dtype: In which to add up.
    """
    norms = torch.stack(torch._foreach_norm(shards, 2, dtype=dtype))
    if groups:
        squares = norms.square()
        for group in groups:
            dist.all_reduce(squares, group=group)
        norms = squares.sqrt()
    return norms


def shard_groups(weight: Tensor) -> _Groups:
    """Return the process groups over which the squares of the shards of ``weight`` add up to the whole."""
    placements: Any = getattr(weight, "placements", None)
    if placements is not None:
        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]  # a DTensor
        return tuple(mesh.get_group(dim) for dim, place in enumerate(placements) if place.is_shard())
    if is_fsdp1_shard(weight):
        # All ranks, whatever FSDP's own group is: where shards are replicated every square is counted equally often,
        # which leaves the ratio of two norms as it is.
        return (dist.group.WORLD,)
    return ()
