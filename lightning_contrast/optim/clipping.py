"""Gradient clipping per parameter (DINO) and over all parameters, on full tensors under FSDP."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import check_positive
from lightning_contrast.sharding import is_fsdp1_shard, local_gradient, norms_over_ranks, shard_groups


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Clip the gradient norm of each parameter separately, in place.

    ``g <- g * min(1, max_norm / (|g| + 1e-6))`` for each tensor. Under FSDP, norms are those of the full tensors
    (FSDP1 with replication also counts the copies). There are no host reads.

    Source: https://github.com/facebookresearch/dino (``utils.clip_gradients``).

    Args:
        parameters: Parameters of any shape ``(...)``; those without a gradient are skipped. Under FSDP every rank must
            pass the same parameters.
        max_norm: Maximum norm of a gradient, > 0; 3 in DINO.

    Raises:
        ValueError: If ``max_norm`` is not above 0.
    """
    check_positive("max_norm", max_norm)
    for gradients, norms in _gradients_and_norms(parameters):
        _scale(gradients, (max_norm / (norms + 1e-6)).clamp(max=1).unbind())


@torch.no_grad()
def clip_gradients_together(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Clip the total norm of all gradients, in place.

    ``g <- g * min(1, max_norm / (|all g| + 1e-6))``. Under FSDP, norms are those of the full tensors (FSDP1 with
    replication also counts the copies). There are no host reads.

    Source: `torch.nn.utils.clip_grad_norm_`. Differs from it: supports the shards of FSDP1.

    Args:
        parameters: Parameters of any shape ``(...)``, as for `clip_each_gradient`.
        max_norm: Maximum total norm, > 0.

    Raises:
        ValueError: If ``max_norm`` is not above 0.
    """
    check_positive("max_norm", max_norm)
    found = list(_gradients_and_norms(parameters))
    if not found:
        return
    device = found[0][1].device
    total = torch.stack([norms.square().sum().to(device) for _, norms in found]).sum().sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1)
    for gradients, norms in found:
        _scale(gradients, [factor.to(norms.device)] * len(gradients))


def _gradients_and_norms(parameters: Iterable[Tensor]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield this rank's gradients in groups of equal device, dtype and sharding, with their full norms ``(n,)``."""
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_gradient(parameter)
        elif is_fsdp1_shard(parameter):
            gradient = parameter.new_empty(0)  # a rank that holds a part of it waits for this one
        else:
            continue
        key = (gradient.device, gradient.dtype, shard_groups(parameter))
        buckets.setdefault(key, []).append(gradient)
    for (_, dtype, groups), gradients in buckets.items():
        yield gradients, norms_over_ranks(gradients, groups, torch.promote_types(dtype, torch.float32))


def _scale(gradients: list[Tensor], factors: Iterable[Tensor]) -> None:
    """Multiply each gradient by its factor, in place."""
    torch._foreach_mul_(gradients, [factor.to(gradients[0].dtype) for factor in factors])
