"""Computation in full precision under autocast."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _upcast(value: Any) -> Any:
    """Convert 16-bit tensors to float32, also inside lists and tuples."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        return [_upcast(item) for item in value]
    return value


def _device_type(values: tuple[Any, ...]) -> str:
    """Return the device type of the first tensor among the arguments."""
    for value in values:
        found = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(found, Tensor):
            return found.device.type
    return "cpu"


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context that disables autocast; devices such as meta have none."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to run outside autocast, with 16-bit tensor arguments as float32; float64 stays float64."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with _without_autocast(_device_type((*args, *kwargs.values()))):
            upcast = {name: _upcast(value) for name, value in kwargs.items()}
            return function(*map(_upcast, args), **upcast)

    return wrapper


def normalize(x: Tensor) -> Tensor:
    """L2-normalize rows; a row of zeros stays zero.

    Args:
        x: Embeddings, ``(B, D)``.

    Returns:
        Unit rows, ``(B, D)``.
    """
    return F.normalize(x, dim=1)


unit_rows = full_precision(normalize)
"""`normalize` in full precision, for use outside the losses."""
