"""What the fused operations share: random numbers drawn on the host, one transfer, no wait for the device."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Backend: TypeAlias = Literal["cpu", "accelerator"] | None
"""How an operation computes: ``"cpu"`` in small blocks, ``"accelerator"`` in batched kernels, None by the device."""

Draw: TypeAlias = dict[str, NDArray[Any]]
"""The random parameters of an operation on the host: one row for every image."""

Plan: TypeAlias = dict[str, Any]
"""What the computation needs: arrays or tensors with one entry per image or row, and plain Python values."""

Rows: TypeAlias = slice | NDArray[np.int64]
"""Some images of a batch: a slice where they lie side by side, which needs no copy, else their indices."""

_ALIGNMENT = 16


def uniform(rows: int, columns: int) -> NDArray[np.float32]:
    """Draw ``rows x columns`` numbers from U(0, 1) with torch's global CPU generator.

    The global generator is what ``torch.random.fork_rng`` and ``torch.manual_seed`` govern. The numbers are used on
    the host as NumPy arrays: shapes that follow from them never depend on data of the device.
    """
    numbers: NDArray[np.float32] = torch.rand(rows, columns, dtype=torch.float32, device="cpu").numpy()
    return numbers


def uses_accelerator_backend(backend: Backend, images: Tensor) -> bool:
    """Tell whether an operation takes its accelerator form for these images."""
    return images.device.type != "cpu" if backend is None else backend == "accelerator"


def to_device(plan: Mapping[str, Any], device: torch.device) -> Plan:
    """Move all arrays of a plan to ``device`` in one non-blocking copy; other values stay as they are.

    Args:
        plan: Arrays and plain values by name.
        device: Where the tensors shall be.

    Returns:
        The plan with tensors in the place of the arrays.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in plan.items() if isinstance(value, np.ndarray)}
    if device.type == "cpu":
        return {**plan, **{name: torch.from_numpy(value) for name, value in arrays.items()}}
    starts, end = {}, 0
    for name, value in arrays.items():  # each array starts where any dtype may start
        starts[name] = end
        end += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = np.zeros(end, dtype=np.uint8)
    for name, value in arrays.items():
        packed[starts[name] : starts[name] + value.nbytes] = value.reshape(-1).view(np.uint8)
    host = torch.from_numpy(packed)
    moved = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    tensors = {}
    for name, value in arrays.items():
        dtype = torch.from_numpy(value[:0]).dtype
        flat = moved[starts[name] : starts[name] + value.nbytes].view(dtype)
        tensors[name] = flat.view(value.shape)
    return {**plan, **tensors}


def rows_where(mask: NDArray[np.bool_]) -> Rows:
    """Return the rows at which ``mask`` ``(B,)`` is true."""
    indices = np.flatnonzero(mask)
    if len(indices) == 0:
        return slice(0, 0)
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def is_empty(rows: slice | Tensor) -> bool:
    """Tell whether there are no rows, without a look at data of the device."""
    return rows.stop == rows.start if isinstance(rows, slice) else len(rows) == 0


def take(images: Tensor, rows: slice | Tensor) -> Tensor:
    """Return the rows of ``images``: a view of them for a slice, a copy for indices."""
    return images[rows] if isinstance(rows, slice) else images.index_select(0, rows)


def put_(images: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    """Write ``values`` into the rows of ``images``."""
    if isinstance(rows, slice):
        images[rows] = values
    else:
        images.index_copy_(0, rows, values)


def put_back_(images: Tensor, rows: slice | Tensor, taken: Tensor) -> None:
    """Write into ``images`` what `take` gave and was then changed in place: nothing to do for a view."""
    if not isinstance(rows, slice):
        images.index_copy_(0, rows, taken)


class FusedOperation:
    """An operation in three steps: `draw` on the host, `prepare` on the host, `compute_` on the device.

    Mixed into Kornia's base classes. The probability with which an image is drawn belongs to `draw`, so that the
    work is done on the drawn images only; Kornia's own gate computes every image and selects afterwards, and is
    therefore left at 1.
    """

    backend: Backend

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw the parameters of ``batch`` images of ``height x width`` pixels.

        Returns:
            Arrays whose first axis is the batch.
        """
        raise NotImplementedError

    def sort_key(self, draw: Draw) -> NDArray[Any] | None:
        """Return numbers ``(B,)`` by which to sort the batch so that equal work lies side by side, or None."""
        return None

    def prepare(self, draw: Draw) -> Plan:
        """Turn a draw, or the part of it that belongs to some images, into what `compute_` needs."""
        raise NotImplementedError

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Return the result; ``images`` ``(B, C, H, W)``, float in 0..1, may be overwritten."""
        raise NotImplementedError

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return a draw as tensors: Kornia's hook."""
        batch, _, height, width = batch_shape
        return {name: torch.from_numpy(value) for name, value in self.draw(batch, height, width).items()}

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Apply the operation with given parameters: Kornia's hook. ``input`` is not changed."""
        draw = {name: value.numpy() for name, value in params.items() if name not in _FROM_KORNIA}
        return self.compute_(input.clone(), to_device(self.prepare(draw), input.device))


_FROM_KORNIA = ("batch_prob", "forward_input_shape", "data_keys")  # its containers mix these in
