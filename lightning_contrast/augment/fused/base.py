"""Base class of the fused operations: host-side random numbers, one transfer, no synchronization with the device."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast._checks import require
from lightning_contrast.seeding import send

Backend: TypeAlias = Literal["cpu", "accelerator"] | None
"""How to compute: ``"cpu"`` on small blocks, ``"accelerator"`` in batched kernels, None depends on the device."""

Draw: TypeAlias = dict[str, NDArray[Any]]
"""Random parameters of an operation on the host, one row per image."""

Plan: TypeAlias = dict[str, Any]
"""Inputs of the computation: arrays or tensors with one entry per image, and plain Python values."""

Rows: TypeAlias = slice | NDArray[np.int64]
"""Images of a batch: a slice if they are contiguous, which needs no copy, else their indices."""

_ALIGNMENT = 16


def uniform(rows: int, columns: int) -> NDArray[np.float32]:
    """Draw ``(rows, columns)`` numbers from U(0, 1) with torch's global CPU generator.

    ``torch.manual_seed`` and ``torch.random.fork_rng`` control that generator. As the numbers stay on the host, shapes
    derived from them never depend on device data.
    """
    numbers: NDArray[np.float32] = torch.rand(rows, columns, dtype=torch.float32, device="cpu").numpy()
    return numbers


def uses_accelerator_backend(backend: Backend, images: Tensor) -> bool:
    """Return whether images ``(B, C, H, W)`` are processed by the accelerator backend."""
    return images.device.type != "cpu" if backend is None else backend == "accelerator"


def to_device(plan: Mapping[str, Any], device: torch.device) -> Plan:
    """Move all arrays of a plan to ``device`` in one non-blocking copy; other values are unchanged.

    Args:
        plan: Arrays and plain values by name.
        device: Device of the returned tensors.

    Returns:
        The plan with tensors of the same shapes instead of arrays.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in plan.items() if isinstance(value, np.ndarray)}
    if device.type == "cpu":
        return {**plan, **{name: torch.from_numpy(value) for name, value in arrays.items()}}
    starts, end = {}, 0
    for name, value in arrays.items():  # aligned for every dtype
        starts[name] = end
        end += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = np.zeros(end, dtype=np.uint8)
    for name, value in arrays.items():
        packed[starts[name] : starts[name] + value.nbytes] = value.reshape(-1).view(np.uint8)
    host = torch.from_numpy(packed)
    moved = send(host, device)
    tensors = {}
    for name, value in arrays.items():
        dtype = torch.from_numpy(value[:0]).dtype
        flat = moved[starts[name] : starts[name] + value.nbytes].view(dtype)
        tensors[name] = flat.view(value.shape)
    return {**plan, **tensors}


def rows_where(mask: NDArray[np.bool_]) -> Rows:
    """Return the rows where ``mask`` ``(B,)`` is true."""
    indices = np.flatnonzero(mask)
    if len(indices) == 0:
        return slice(0, 0)
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def is_empty(rows: slice | Tensor) -> bool:
    """Return whether there are no rows ``(n,)``, without reading device data."""
    return rows.stop == rows.start if isinstance(rows, slice) else len(rows) == 0


def take(images: Tensor, rows: slice | Tensor) -> Tensor:
    """Return rows ``(n, C, H, W)`` of ``images`` ``(B, C, H, W)``: a view for a slice, a copy for indices."""
    return images[rows] if isinstance(rows, slice) else images.index_select(0, rows)


def put_(images: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    """Write ``values`` ``(n, C, H, W)`` into the rows of ``images`` ``(B, C, H, W)``."""
    if isinstance(rows, slice):
        images[rows] = values
    else:
        images.index_copy_(0, rows, values)


def put_back_(images: Tensor, rows: slice | Tensor, taken: Tensor) -> None:
    """Write rows ``(n, C, H, W)`` from `take` back into ``images`` after in-place changes; a no-op for a slice."""
    if not isinstance(rows, slice):
        images.index_copy_(0, rows, taken)


def towards(value: float, neutral: float, strength: float) -> float:
    """Return a parameter at a strength in 0..1: ``value`` itself at 1, the ``neutral`` one at 0."""
    return value + (1 - strength) * (neutral - value)


def floored(scale: tuple[float, float], share: float) -> tuple[float, float]:
    """Return a range of a crop's area that starts at ``share`` or above; raise if the whole range lies below."""
    hint = "Lower `min_area`, or choose a view with larger crops"
    require(share <= scale[1], "min_area", f"be at most {scale[1]}, the largest crop of the view", share, hint)
    return max(scale[0], share), scale[1]


class FusedOperation:
    """Mixin for Kornia's base classes that splits an operation into host and device parts.

    `draw` and `prepare` run on the host, `compute_` on the device. The probability of an operation is part of `draw`,
    so that only the selected images are computed; Kornia's own probability computes every image and selects afterwards,
    and is therefore left at 1.

    Attributes:
        probability: Share of the images that are changed.
        share: Share of the operation's strength with which `draw` draws, in 0..1; see `ViewPolicy.set_strength`.
    """

    backend: Backend
    probability: float
    share: float = 1.0
    moves_pixels: bool = False  # whether a pixel of the result shows another place than that pixel of the input

    @property
    def chance(self) -> float:
        """The probability at the present strength, for operations whose strength is how many images they change."""
        return self.probability * self.share

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw the parameters of ``batch`` images of ``height x width`` pixels.

        Returns:
            Arrays whose first axis is the batch.
        """
        raise NotImplementedError

    def sort_key(self, draw: Draw) -> NDArray[Any] | None:
        """Return keys ``(B,)`` that sort images with equal work next to each other, or None."""
        return None

    def prepare(self, draw: Draw) -> Plan:
        """Convert a draw, or its rows for some of the images, into the inputs of `compute_`."""
        raise NotImplementedError

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Return the result ``(B, C, h, w)``; ``images`` ``(B, C, H, W)``, float in 0..1, may be overwritten."""
        raise NotImplementedError

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return a draw as tensors (a hook of Kornia)."""
        batch, _, height, width = batch_shape
        return {name: torch.from_numpy(value) for name, value in self.draw(batch, height, width).items()}

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Apply the operation to ``input`` ``(B, C, H, W)``, which is not modified (a hook of Kornia)."""
        draw = {name: value.numpy() for name, value in params.items() if name not in _FROM_KORNIA}
        return self.compute_(input.clone(), to_device(self.prepare(draw), input.device))


_FROM_KORNIA = ("batch_prob", "forward_input_shape", "data_keys")  # added by Kornia's containers
