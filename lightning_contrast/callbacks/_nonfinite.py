"""What is not finite in a step, and the running averages that its forward passes have moved."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_contrast.nn.ema import clean_name

_AVERAGES = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Finding:
    """The first bad tensor of a rank.

    Args:
        order: Where it comes in a step; a rank that has none comes last.
        text: What it is, in words.
        in_weights: Whether it is a weight.
    """

    order: int
    text: str
    in_weights: bool = False


class RunningStatistics:
    """Copies of the running averages of all normalisation layers, online and momentum."""

    def __init__(self) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._kept: list[Tensor] = []

    def find(self, module: nn.Module) -> None:
        """Look for the layers, anew for each fit."""
        layers = [layer for layer in module.modules() if isinstance(layer._buffers.get("running_mean"), Tensor)]
        self._places = [(layer, name) for layer in layers for name in _AVERAGES if layer._buffers.get(name) is not None]
        self._kept = []

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the averages."""
        now = self._now()
        if len(self._kept) != len(now) or any(a.device != b.device for a, b in zip(now, self._kept, strict=True)):
            self._kept = [tensor.clone() for tensor in now]
        elif now:
            _copy(now, self._kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back."""
        if self._kept:
            _copy(self._kept, self._now())

    def _now(self) -> list[Tensor]:
        found = [layer._buffers[name] for layer, name in self._places]
        return [tensor for tensor in found if tensor is not None]

    def __reduce__(self) -> tuple[type["RunningStatistics"], tuple[()]]:
        """Copy and pickle as empty: the layers belong to the module of this process."""
        return RunningStatistics, ()


def has_bad_gradient(optimizer: Optimizer, device: torch.device) -> Tensor:
    """Return whether any gradient of an optimizer is not finite, on the device; of shards, this rank's.

    Args:
        optimizer: Its parameters' gradients are looked at.
        device: Where the answer lies.
    """
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradient = _values(parameter.grad)
                if gradient.numel():
                    buckets.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    # The largest absolute value cannot overflow, as a sum of squares can.
    flags = [~torch.stack(torch._foreach_norm(bucket, math.inf)).isfinite().all() for bucket in buckets.values()]
    if not flags:
        return torch.zeros((), dtype=torch.bool, device=device)
    return torch.stack([flag.to(device) for flag in flags]).any()


def describe(module: nn.Module, optimizer: Optimizer | None, batch: Any, *, has_bad_loss: bool) -> Finding:
    """Return the first bad tensor of this rank, in the order in which a step makes them; it may wait for the device.

    Args:
        module: The LightningModule.
        optimizer: Its gradients are looked at; None: no gradients.
        batch: The batch of the bad loss, or None where it is not at hand.
        has_bad_loss: Whether a loss of this rank is not finite.
    """
    for name, tensor in _leaves(batch, "batch"):
        if _is_bad(tensor):
            return Finding(0, f"{_kind(tensor)} in `{name}`")
    for name, parameter in module.named_parameters():
        if _is_bad(parameter):
            return Finding(1, f"{_kind(parameter)} in the weights `{clean_name(name)}`", in_weights=True)
    if has_bad_loss:
        return Finding(2, "the loss")
    groups = optimizer.param_groups if optimizer is not None else []
    own = {id(parameter) for group in groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if id(parameter) in own and parameter.grad is not None and _is_bad(parameter.grad):
            return Finding(3, f"{_kind(parameter.grad)} in the gradient of `{clean_name(name)}`")
    return Finding(4, "on another rank")


def _is_bad(tensor: Tensor) -> bool:
    values = _values(tensor)
    return values.is_floating_point() and not bool(values.isfinite().all())


def _kind(tensor: Tensor) -> str:
    return "NaN" if bool(_values(tensor).isnan().any()) else "infinity"


def _values(tensor: Tensor) -> Tensor:
    """Return the values that this rank holds."""
    tensor = tensor.detach()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local._values() if local.is_sparse else local


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy tensors, all floats at once and all integers at once."""
    for is_float in (True, False):
        chosen = [i for i, tensor in enumerate(sources) if tensor.is_floating_point() == is_float]
        if chosen:
            torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for key, item in enumerate(value):
            yield from _leaves(item, f"{name}[{key}]")
