"""Gradient clipping of each parameter on its own, as the DINO family has it, and of all together, over shards."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import check_positive
from lightning_contrast.sharding import is_fsdp1_shard, local_gradient, norms_over_ranks, shard_groups


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Scale down, in place, the gradient of each parameter whose norm is above ``max_norm``.

    ``g <- g * min(1, max_norm / (|g| + 1e-6))`` for each tensor alone, so that no layer is made smaller by another one.
    Norms are of whole tensors, over all shards under FSDP (where FSDP1 also replicates, the copies count too). Nothing
    is read on the host.

    Source: https://github.com/facebookresearch/dino (``utils.clip_gradients``).

    Args:
        parameters: Parameters of any shapes; those without a gradient are left out. Under FSDP every rank must give
            the same ones.
        max_norm: Largest norm of a gradient, > 0; 3 in DINO.

    Raises:
        ValueError: If ``max_norm`` is not above 0.
    """
    check_positive("max_norm", max_norm)
    for gradients, norms in _gradients_and_norms(parameters):
        _scale(gradients, (max_norm / (norms + 1e-6)).clamp(max=1).unbind())


@torch.no_grad()
def clip_gradients_together(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Scale down, in place, all gradients alike where the norm of all of them is above ``max_norm``.

    ``g <- g * min(1, max_norm / (|all g| + 1e-6))``. Norms are of whole tensors, over all shards under FSDP (where
    FSDP1 also replicates, the copies count too). Nothing is read on the host.

    Source: `torch.nn.utils.clip_grad_norm_`. Differs from it: FSDP1's shards count as the tensors that they are of.

    Args:
        parameters: As for `clip_each_gradient`.
        max_norm: Largest norm of all gradients together, > 0.

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
    """Yield this rank's gradients, in groups of a kind, with the norms of the whole tensors ``(n,)``."""
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_gradient(parameter)
        elif is_fsdp1_shard(parameter):
            gradient = parameter.new_empty(0)  # another rank may hold a part of it and waits for this one
        else:
            continue
        key = (gradient.device, gradient.dtype, shard_groups(parameter))
        buckets.setdefault(key, []).append(gradient)
    for (_, dtype, groups), gradients in buckets.items():
        yield gradients, norms_over_ranks(gradients, groups, torch.promote_types(dtype, torch.float32))


def _scale(gradients: list[Tensor], factors: Iterable[Tensor]) -> None:
    """Multiply each gradient with its factor, in place."""
    torch._foreach_mul_(gradients, [factor.to(gradients[0].dtype) for factor in factors])
