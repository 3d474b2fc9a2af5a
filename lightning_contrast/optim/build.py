"""Construction of optimizers by name."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from lightning_contrast._checks import check_choice, check_not_negative, fail
from lightning_contrast.optim.lars import LARS
from lightning_contrast.sharding import local

OptimizerLike: TypeAlias = str | Callable[..., Optimizer]
OPTIMIZERS = ("sgd", "adamw", "lars", "lamb")
OWN_RATE = "own_lr"
"""Key of a parameter group; True if its peak rate is its own, which does not follow the global batch."""


def check_optimizer(optimizer: OptimizerLike) -> None:
    """Check the ``optimizer`` argument of a method.

    Args:
        optimizer: A name or a callable.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor a callable.
    """
    if isinstance(optimizer, str):
        check_choice("optimizer", optimizer, OPTIMIZERS)
    elif not callable(optimizer):
        hint = f"Pass one of {', '.join(map(repr, OPTIMIZERS))}, or an optimizer class"
        fail("optimizer", "be a name or a callable", type(optimizer).__name__, hint, TypeError)


def build_optimizer(
    optimizer: OptimizerLike, groups: list[dict[str, Any]], lr: float, *, sgd_momentum: float = 0.9, **options: Any
) -> Optimizer:
    """Build the optimizer of a method.

    Args:
        optimizer: ``"sgd"``, ``"adamw"``, ``"lars"`` or ``"lamb"`` (timm's); or a callable, such as an optimizer
            class, that takes the groups and optionally ``lr``.
        groups: Parameter groups with their weight decay, as `parameter_groups` returns them. A group may have an ``lr``
            of its own, which is then marked with ``own_lr``, and ``bounds``, the smallest and largest value of its
            parameters, which are clamped after every step.
        lr: Learning rate of the groups without one, >= 0.
        sgd_momentum: Momentum of ``"sgd"`` and ``"lars"``, in [0, 1).
        options: Further arguments of the optimizer, such as ``betas`` or ``trust_coefficient``.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If ``optimizer`` is neither a name nor a callable, or does not return an optimizer.
    """
    check_not_negative("lr", lr)
    check_optimizer(optimizer)
    # Copies, since torch writes its defaults into the dicts
    groups = [group | {OWN_RATE: True} if "lr" in group else dict(group) for group in groups]
    built = _build(optimizer, groups, lr, sgd_momentum, options)
    if any("bounds" in group for group in built.param_groups):
        built.register_step_post_hook(_clamp)
    return built


def _build(
    optimizer: OptimizerLike, groups: list[dict[str, Any]], lr: float, sgd_momentum: float, options: dict[str, Any]
) -> Optimizer:
    if isinstance(optimizer, str):
        if optimizer == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=sgd_momentum, **options)
        if optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=lr, **options)
        if optimizer == "lars":
            return LARS(groups, lr=lr, momentum=sgd_momentum, **options)
        from timm.optim.lamb import Lamb

        return Lamb(groups, lr=lr, **options)
    given = {"lr": lr} if _takes_lr(optimizer) else {}
    built = optimizer(groups, **given, **options)
    if not isinstance(built, Optimizer):
        hint = "Return a torch.optim.Optimizer over the given groups"
        fail("optimizer", "return an optimizer", type(built).__name__, hint, TypeError)
    return built


@torch.no_grad()
def _clamp(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Clamp the parameters of the groups with ``bounds``, each rank its own shard, without a host read."""
    for group in optimizer.param_groups:
        if "bounds" in group:
            for parameter in group["params"]:
                local(parameter).clamp_(*group["bounds"])


def _takes_lr(optimizer: Callable[..., Optimizer]) -> bool:
    """Return whether a callable takes ``lr``."""
    parameters = inspect.signature(optimizer).parameters
    return "lr" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
