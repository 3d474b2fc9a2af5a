"""EMA teachers: copies without gradient and without dropout."""

import copy
from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def teacher_of(network: _Module) -> _Module:
    """Return a copy of a network for its EMA teacher, without gradient, dropout and stochastic depth.

    Args:
        network: A part of the student.
    """
    return without_drop(copy.deepcopy(network)).requires_grad_(False)


def without_drop(network: _Module) -> _Module:
    """Disable stochastic depth and dropout in place, also for train mode.

    Args:
        network: The teacher.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(getattr(module, "drop_prob", None), float):  # timm's DropPath
            module.drop_prob = 0.0  # type: ignore[assignment]  # nn.Module is typed to hold modules and tensors
    return network
