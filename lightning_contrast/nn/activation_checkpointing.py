"""Activation checkpointing that does not update BatchNorm statistics twice."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_contrast._checks import check_choice, fail

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
_Module = TypeVar("_Module", bound=nn.Module)


def checkpoint_activations(module: _Module, layers: Sequence[str] | None = None) -> _Module:
    """Recompute the activations of layers in the backward pass instead of storing them.

        model = lc.MoCo("resnet50")
        lc.nn.checkpoint_activations(model.backbone)

    Weights, gradients and dropout masks are bit-identical to those without checkpointing. Names in the state dict do
    not change; copies and pickles of the network keep it. Forward passes without gradient are not affected.

    Source: `torch.utils.checkpoint` (non-reentrant). Differs from it: BatchNorm's running averages are updated once per
    step, not again during the recomputation.

    Args:
        module: The network, changed in place.
        layers: Names of submodules, as ``named_modules`` gives them. None: the members of its outermost
            ``nn.Sequential`` and ``nn.ModuleList`` containers that contain layers themselves (the blocks of timm's
            networks).

    Returns:
        The module.

    Raises:
        TypeError: If ``module`` is not an ``nn.Module``.
        ValueError: If a name is unknown, or ``layers`` is None and the network has no blocks.
    """
    if not isinstance(module, nn.Module):
        fail("module", "be an nn.Module", type(module).__name__, "Give for example `model.backbone`", TypeError)
    known = {name: layer for name, layer in module.named_modules() if name}
    for name in layers or ():
        check_choice("layers", name, known)
    chosen = _blocks(module) if layers is None else [known[name] for name in layers]
    if not chosen:
        fail("layers", f"be named: {type(module).__name__} has no container of blocks", layers, "Name its large layers")
    for layer in chosen:
        if not isinstance(layer.__dict__.get("forward"), CheckpointedForward):
            layer.__dict__["forward"] = CheckpointedForward(layer)
    return module


class CheckpointedForward:
    """Replacement of a layer's ``forward``; it is copied and pickled with the layer.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.inner = layer, layer.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer's forward pass returns."""
        forward = self.inner or type(self.layer).forward.__get__(self.layer)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), frozen_running_statistics(self.layer)

        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running averages of a module unchanged: forward passes update copies of them.

    Args:
        module: Any module; all of its submodules with a ``running_mean`` keep their averages.
    """
    kept = []
    for child in module.modules():
        if child._buffers.get("running_mean") is None:
            continue
        for name in _RUNNING:
            buffer = child._buffers.get(name)
            if buffer is not None:
                kept.append((child, name, buffer))
                child._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for child, name, buffer in kept:
            child._buffers[name] = buffer


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost containers that have children; single layers would save no memory."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return [member for member in module if len(list(member.children())) > 0]
    return [block for child in module.children() for block in _blocks(child)]
