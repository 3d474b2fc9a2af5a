"""Computation in float32, whatever autocast and the precision of matrix products are set to."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def upcast(value: Any) -> Any:
    """Convert 16-bit tensors to float32, also inside lists and tuples; other values are returned as they are.

    Args:
        value: Of any type.
    """
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        return [upcast(item) for item in value]
    return value


def _device_type(values: tuple[Any, ...]) -> str:
    """Return the device type of the first tensor among the arguments."""
    for value in values:
        found = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(found, Tensor):
            return found.device.type
    return "cpu"


_FULL = ("none", "ieee")  # values of `fp32_precision` that do not round the inputs of matrix products


@contextmanager
def float32_products(device_type: str) -> Iterator[None]:
    """Compute matrix products of float32 tensors in float32 within a block.

    Autocast is disabled, and so are TF32 and bfloat16 products, which ``torch.set_float32_matmul_precision("high")`` or
    ``"medium"`` allows. Logits are cosines divided by temperatures of 0.1 and less, which amplifies that rounding.
    Inside a compiled function the precision of products is left as it is.

    Args:
        device_type: Device type of the tensors; devices such as meta have no autocast.
    """
    torch_backends: Any = torch.backends  # has no complete annotations
    backends, before = [torch_backends.cuda.matmul, torch_backends.mkldnn.matmul], []
    reduced = False
    if not torch.compiler.is_compiling():
        before = [backend.fp32_precision for backend in backends]
        reduced = any(value not in _FULL for value in (*before, torch_backends.fp32_precision))
    available = torch.amp.is_autocast_available(device_type)
    with torch.autocast(device_type, enabled=False) if available else nullcontext():
        if not reduced:
            yield
            return
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to compute in float32: 16-bit tensor arguments are converted, float64 stays float64.

    Matrix products are those of `float32_products`, in backward as well in the tiled losses.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with float32_products(_device_type((*args, *kwargs.values()))):
            named = {name: upcast(value) for name, value in kwargs.items()}
            return function(*map(upcast, args), **named)

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
