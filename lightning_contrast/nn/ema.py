"""Exponential moving average of one network's weights in another of the same structure."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_choice, check_probability

BufferRule: TypeAlias = Literal["none", "copy", "ema"]
BUFFER_RULES: tuple[BufferRule, ...] = ("none", "copy", "ema")


@torch.no_grad()
def ema_update(online: nn.Module, target: nn.Module, momentum: float, *, buffers: BufferRule = "none") -> None:
    """Move ``target`` towards ``online``: ``target <- momentum * target + (1 - momentum) * online``.

    Eq. 2 of MoCo (https://arxiv.org/abs/1911.05722) and Eq. 1 of BYOL (https://arxiv.org/abs/2006.07733). One pass over
    the weights (a fused linear interpolation), equal to multiply and add within one rounding (2.4e-7 relative). The
    online weights may be of lower precision than the target's; a target that is itself kept in bfloat16 or float16
    hardly moves where ``momentum`` is above 0.99: `MomentumUpdate` holds a float32 master for such a target.

    Args:
        online: The network that is trained.
        target: The network that follows, with parameters and buffers of the same shapes in the same order.
        momentum: Share of the target that is kept; in [0, 1].
        buffers: What becomes of floating buffers such as BatchNorm's running averages: "none" leaves them to the
            target's own forward passes, "copy" takes the online network's, "ema" averages them like the weights.
            Buffers that are not floating (counters) are always copied.

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
    if any(not target.is_floating_point() for target in targets):
        pairs = list(zip(sources, targets, strict=True))
        for source, target in pairs:
            if not target.is_floating_point():
                target.copy_(source)
        pairs = [(source, target) for source, target in pairs if target.is_floating_point()]
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    if targets:
        cast = [s if s.dtype == t.dtype else s.to(t.dtype) for s, t in zip(sources, targets, strict=True)]
        torch._foreach_lerp_(list(targets), cast, 1.0 - momentum)


@torch.no_grad()
def update_buffers(sources: Sequence[Tensor], targets: Sequence[Tensor], momentum: float, rule: BufferRule) -> None:
    """Treat buffers by ``rule`` (see `ema_update`); those that are not floating are always copied.

    Args:
        sources: Buffers of the online network, of any shape.
        targets: Buffers of the target network, of the same shapes; changed in place.
        momentum: Share of the target that is kept where the rule is "ema"; in [0, 1].
        rule: "none", "copy" or "ema".
    """
    if rule == "ema":
        lerp_tensors(sources, targets, momentum)
        return
    for source, target in zip(sources, targets, strict=True):
        if rule == "copy" or not target.is_floating_point():
            target.copy_(source)


def check_same_structure(online: nn.Module, target: nn.Module, *, shapes: bool = True) -> None:
    """Raise unless both networks have parameters and buffers of the same names and shapes in the same order.

    Args:
        online: The network that is trained.
        target: The network that follows it.
        shapes: Compare the shapes too; False where each process sees another part of the tensors.

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
    for (name, source), (_, follower) in zip(ours, theirs, strict=True):
        if shapes and source.shape != follower.shape:
            raise ValueError(
                f"`momentum_pairs` must hold modules of the same structure, got {name!r} of shape "
                f"{tuple(source.shape)} in the online and {tuple(follower.shape)} in the momentum module. {hint}."
            )


def _same_shapes(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> bool:
    return len(sources) == len(targets) and all(s.shape == t.shape for s, t in zip(sources, targets, strict=True))


def clean_name(name: str) -> str:
    """Return the name of a tensor without what FSDP, torch.compile and activation checkpointing put into it."""
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and then the buffers of a module with their clean names."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(clean_name(name), tensor) for name, tensor in named]
