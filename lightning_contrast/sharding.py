"""Names of wrapped tensors; norms and trust ratios of full tensors computed from the shards of each rank."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "clean_name",
    "is_fsdp1_shard",
    "local",
    "local_gradient",
    "norms_over_ranks",
    "shard_groups",
    "trust_ratios",
]

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_Groups: TypeAlias = tuple[Any, ...]


def clean_name(name: str) -> str:
    """Return the name of a tensor or module without what FSDP, torch.compile and activation checkpointing insert.

    Args:
        name: A name as `named_parameters`, `named_buffers` or `named_modules` of ``torch.nn`` gives it.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor (sharing its memory), and any other tensor unchanged.

    Args:
        tensor: A tensor of any shape.
    """
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def local_gradient(weight: Tensor) -> Tensor:
    """Return the gradient of this rank's shard of a weight.

    Args:
        weight: A parameter of any shape whose ``grad`` is not None.

    Raises:
        ValueError: If the gradient is sparse.
    """
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
    """Return whether ``weight`` is a view of a flat FSDP1 shard (``use_orig_params=True``).

    On ranks that hold no part of the tensor, such a view is empty and has no gradient.

    Args:
        weight: A parameter of any shape.
    """
    return bool(getattr(weight, "_fsdp_flattened", False))


def trust_ratios(
    weights: list[Tensor], updates: list[Tensor], rule: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Return one trust ratio per weight, a scalar on its device.

    Args:
        weights: Parameters of any shape.
        updates: This rank's shard of each gradient, empty if it has none.
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
    """Return the 2-norms ``(n,)`` of full tensors from their shards, without host reads.

    Args:
        shards: This rank's shard of each of the n tensors, all on one device.
        groups: Process groups returned by `shard_groups`; empty for unsharded tensors.
        dtype: Dtype of the accumulation.
    """
    norms = torch.stack(torch._foreach_norm(shards, 2, dtype=dtype))
    if groups:
        squares = norms.square()
        for group in groups:
            dist.all_reduce(squares, group=group)
        norms = squares.sqrt()
    return norms


def shard_groups(weight: Tensor) -> _Groups:
    """Return the process groups over which the squared norms of the shards of ``weight`` are summed.

    Args:
        weight: A parameter of any shape.
    """
    placements: Any = getattr(weight, "placements", None)
    if placements is not None:
        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]  # a DTensor
        return tuple(mesh.get_group(dim) for dim, place in enumerate(placements) if place.is_shard())
    if is_fsdp1_shard(weight):
        # All ranks, regardless of FSDP's group: replicated shards are all counted equally often, which does not change
        # the ratio of two norms.
        return (dist.group.WORLD,)
    return ()
