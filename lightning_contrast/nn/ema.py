"""Exponential moving average (EMA) of a network's weights in a second network of the same structure."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_choice, check_probability
from lightning_contrast.sharding import clean_name

BufferRule: TypeAlias = Literal["none", "copy", "ema"]
BUFFER_RULES: tuple[BufferRule, ...] = ("none", "copy", "ema")


@torch.no_grad()
def ema_update(online: nn.Module, target: nn.Module, momentum: float, *, buffers: BufferRule = "none") -> None:
    """Update an EMA network: ``target <- momentum * target + (1 - momentum) * online``.

    Eq. 2 of MoCo (https://arxiv.org/abs/1911.05722) and Eq. 1 of BYOL (https://arxiv.org/abs/2006.07733). Computed as a
    fused linear interpolation, which equals multiply and add within one rounding (2.4e-7 relative). The online weights
    may have lower precision than the target's. A target in bfloat16 or float16 hardly changes if ``momentum`` is above
    0.99: `MomentumUpdate` keeps a float32 master for such a target.

    Args:
        online: The network that is trained.
        target: The EMA network, with parameters and buffers of the same shapes in the same order.
        momentum: Share of the target that is kept; in [0, 1].
        buffers: Rule for floating buffers such as BatchNorm's running averages: "none" leaves them to the target's own
            forward passes, "copy" copies the online network's, "ema" averages them like the weights. Buffers that are
            not floating (counters) are always copied.

    Raises:
        ValueError: If the momentum lies outside [0, 1] or the two networks differ in structure.
    """
    check_probability("momentum", momentum)
    check_choice("buffers", buffers, BUFFER_RULES)
    sources, targets = list(online.parameters()), list(target.parameters())
    source_buffers, target_buffers = list(online.buffers()), list(target.buffers())
    if not (_same_shapes(sources, targets) and _same_shapes(source_buffers, target_buffers)):
        check_same_structure(online, target)
    lerp_tensors(sources, targets, momentum)
    update_buffers(source_buffers, target_buffers, momentum, buffers)


@torch.no_grad()
def lerp_tensors(sources: Sequence[Tensor], targets: Sequence[Tensor], momentum: float) -> None:
    """Move each target tensor towards its source, in the target's own precision.

    Args:
        sources: Tensors of any shape and floating dtype.
        targets: Tensors of the same shapes, changed in place. Those that are not floating are copied.
        momentum: Share of the target that is kept; in [0, 1].
    """
    pairs = list(zip(sources, targets, strict=True))
    _copy_tensors([pair for pair in pairs if not pair[1].is_floating_point()])
    floating = [(source, target) for source, target in pairs if target.is_floating_point()]
    if floating:
        cast = [source if source.dtype == target.dtype else source.to(target.dtype) for source, target in floating]
        torch._foreach_lerp_([target for _, target in floating], cast, 1.0 - momentum)


@torch.no_grad()
def update_buffers(sources: Sequence[Tensor], targets: Sequence[Tensor], momentum: float, rule: BufferRule) -> None:
    """Update buffers by ``rule`` (see `ema_update`); those that are not floating are always copied.

    Args:
        sources: Buffers of the online network, of any shape.
        targets: Buffers of the target network, of the same shapes; changed in place.
        momentum: Share of the target that is kept where the rule is "ema"; in [0, 1].
        rule: "none", "copy" or "ema".
    """
    if rule == "ema":
        lerp_tensors(sources, targets, momentum)
        return
    pairs = zip(sources, targets, strict=True)
    _copy_tensors([pair for pair in pairs if rule == "copy" or not pair[1].is_floating_point()])


def _copy_tensors(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each source into its target with one kernel launch for all: a ResNet-50 has 53 BatchNorm counters."""
    if pairs:
        torch._foreach_copy_([target for _, target in pairs], [source for source, _ in pairs])


def check_same_structure(online: nn.Module, target: nn.Module, *, shapes: bool = True) -> None:
    """Raise unless both networks have parameters and buffers of the same names and shapes in the same order.

    Args:
        online: The network that is trained.
        target: The EMA network.
        shapes: Also compare shapes; False if each process holds different parts of the tensors.

    Raises:
        ValueError: If they differ; the message names the first tensor that does.
    """
    ours, theirs = _tensors(online), _tensors(target)
    names, target_names = [name for name, _ in ours], [name for name, _ in theirs]
    hint = "Make the momentum module with `copy.deepcopy(online)`"
    for name in [*names, *target_names]:
        if (name in names) != (name in target_names):
            owner, other = ("online", "momentum") if name in names else ("momentum", "online")
            raise ValueError(
                f"`momentum_pairs` must hold modules of the same structure, got {name!r} in the {owner} module and not "
                f"in the {other} module. {hint}."
            )
    if names != target_names:
        raise ValueError(
            f"`momentum_pairs` must hold modules of the same structure, got tensors in another order. {hint}."
        )
    for (name, source), (_, other_tensor) in zip(ours, theirs, strict=True):
        if shapes and source.shape != other_tensor.shape:
            raise ValueError(
                f"`momentum_pairs` must hold modules of the same structure, got {name!r} of shape "
                f"{tuple(source.shape)} in the online and {tuple(other_tensor.shape)} in the momentum module. {hint}."
            )


def _same_shapes(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> bool:
    return len(sources) == len(targets) and all(s.shape == t.shape for s, t in zip(sources, targets, strict=True))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and then the buffers of a module by their clean names."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(clean_name(name), tensor) for name, tensor in named]
