"""Views that remember where in the image they were cut."""

from typing import Any

import torch
from torch import Tensor

from lightning_contrast.precision import upcast


class LocatedView(Tensor):
    """A view with the box that it shows: a tensor that remembers its place in the image.

    Policies make it with ``locations=True``. Results of operations are plain tensors; only `to` keeps the boxes.

    Args:
        pixels: ``(B, C, h, w)`` float.
        boxes: Top, left, height and width of each crop in pixels of its image, and 1 where it was flipped from left to
            right, else 0; ``(B, 5)`` float, on the device of the pixels.
    """

    boxes: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as Parameter has it

    @staticmethod
    def __new__(cls, pixels: Tensor, boxes: Tensor) -> "LocatedView":
        """Return the pixels as a tensor with boxes, of the same memory; one of another subclass keeps its type."""
        view: Any = pixels.as_subclass(cls) if type(pixels) is Tensor else pixels
        view.boxes = boxes
        return view  # type: ignore[no-any-return]

    def to(self, *args: Any, **kwargs: Any) -> "LocatedView":
        """Return the view on another device or of another dtype, as `Tensor.to`."""
        pixels = self.as_subclass(Tensor).to(*args, **kwargs)
        return LocatedView(pixels, self.boxes.to(pixels.device))

    def __deepcopy__(self, memo: Any) -> "LocatedView":
        return LocatedView(self.as_subclass(Tensor).clone(), self.boxes.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return LocatedView, (self.as_subclass(Tensor), self.boxes)


def cell_locations(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """Return where in the image the centers of the cells of a view are.

    Args:
        boxes: As those of `LocatedView`, ``(B, 5)``.
        rows: Number h of rows of the grid.
        columns: Number w of its columns.

    Returns:
        Row and column in pixels of the image, ``(B, h, w, 2)``.

    Example:
        >>> cell_locations(torch.tensor([[10.0, 20.0, 4.0, 8.0, 1.0]]), 1, 2).tolist()
        [[[[12.0, 26.0], [12.0, 22.0]]]]
    """
    boxes = upcast(boxes)
    top, left, height, width, flip = boxes[:, :, None, None].unbind(1)  # (B, 1, 1) each
    down = (torch.arange(rows, device=boxes.device, dtype=boxes.dtype) + 0.5)[:, None] / rows  # (h, 1)
    across = (torch.arange(columns, device=boxes.device, dtype=boxes.dtype) + 0.5) / columns  # (w,)
    across = torch.where(flip > 0, 1 - across, across)  # (B, 1, w)
    return torch.stack(
        [(top + height * down).expand(-1, -1, columns), (left + width * across).expand(-1, rows, -1)], dim=-1
    )
