"""Teacher networks: copies without gradient and without dropout."""

import copy
from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def teacher_of(network: _Module) -> _Module:
    """Return a copy that follows the network as its teacher: without gradients, and without drops in train mode too.

    Args:
        network: A part of the student.
    """
    return without_drop(copy.deepcopy(network)).requires_grad_(False)


def without_drop(network: _Module) -> _Module:
    """Switch stochastic depth and dropout off for good, in place: a teacher drops nothing, also in train mode.

    Args:
        network: The teacher.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(getattr(module, "drop_prob", None), float):  # timm's DropPath
            module.drop_prob = 0.0  # type: ignore[assignment]  # nn.Module is typed to hold modules and tensors
    return network
