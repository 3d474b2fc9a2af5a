"""Random views of a batch made by a sequence of fused operations."""

import functools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_contrast.augment.fused.base import (
    Backend,
    Draw,
    FusedOperation,
    Plan,
    floored,
    to_device,
    uses_accelerator_backend,
)
from lightning_contrast.augment.images import as_float
from lightning_contrast.augment.located_view import LocatedView

_BLOCK_BYTES = 1 << 23  # of float32 views on a CPU: smaller blocks add call overhead, larger ones exceed the cache
_JOINT_BYTES = 1 << 30  # of float32 images and views on an accelerator: larger kernels gain nothing from being joined


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc keep the memory of temporary tensors for reuse, once per process.

    By default glibc returns blocks of this size to the system and faults them in again page by page, which takes a
    quarter of the time of a batch of views. It stops doing so for blocks up to the largest, at most 32 MiB, that was
    ever freed; the block freed here is never touched and therefore costs nothing. Other allocators are unaffected.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


class FusedView(nn.Module):
    """Make random views of each image with a sequence of fused operations.

    All random numbers are drawn on the host first, and what the device needs of them is transferred in one copy. On a
    CPU the operations run on blocks of images that fit the cache; on an accelerator they run on the whole batch, and on
    several views of it at once.

    Args:
        crop: Resamples the image to the height and width of the view; has a ``shape``.
        operations: Applied after the crop, in order.
        mean: Subtracted at the end, one number per channel.
        std: Divided by at the end, one number per channel.
        pre_transform: Applied to the float images first.
        backend: See `Backend`.
    """

    def __init__(
        self,
        crop: FusedOperation,
        operations: Sequence[FusedOperation],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        pre_transform: nn.Module | None = None,
        backend: Backend = None,
    ) -> None:
        super().__init__()
        self.pre_transform = pre_transform
        self.operations = nn.ModuleList(cast("Sequence[nn.Module]", [crop, *operations]))
        self.backend = backend
        self.locates = False  # make each view a `LocatedView`
        for operation in self._operations():
            operation.backend = backend
        self.offset = np.array([-m / s for m, s in zip(mean, std, strict=True)], np.float32).reshape(1, -1, 1, 1)
        self.factor = np.array([1 / s for s in std], np.float32).reshape(1, -1, 1, 1)
        self.normalizes = bool((self.offset != 0).any() or (self.factor != 1).any())

    def set_strength(self, strength: float) -> None:
        """Set the strength, in 0..1; see `ViewPolicy.set_strength`."""
        for operation in self._operations():
            operation.share = strength
        pre_transform: Any = self.pre_transform
        if hasattr(pre_transform, "set_strength"):
            pre_transform.set_strength(strength)

    def set_min_area(self, share: float) -> None:
        """Draw no crop with less than a share of the image area, in 0..1; see `ViewPolicy.candidates`."""
        crop: Any = self.operations[0]
        crop.scale = floored(crop.scale, share)

    def _operations(self) -> list[FusedOperation]:
        return [cast("FusedOperation", operation) for operation in self.operations]

    @property
    def _shape(self) -> tuple[int, int]:
        height, width = cast("Any", self.operations[0]).shape
        return int(height), int(width)

    def forward(self, images: Tensor) -> Tensor:
        """Return one view ``(B, C, h, w)`` of ``images`` ``(B, C, H, W)``, uint8 or float."""
        return self.make_views(images, 1)[0]

    def make_views(
        self, images: Tensor, count: int, sizes: NDArray[np.int64] | None = None, *, frames: int = 1
    ) -> list[Tensor]:
        """Return views with random numbers of their own, the same as from ``count`` calls of `forward`.

        Args:
            images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1.
            count: Number of views, >= 1.
            sizes: See `FusedResizedCrop.draw`.
            frames: Number of consecutive images that share a draw, such as the frames of a clip; divides B.

        Returns:
            Views ``(B, C, h, w)``, float32.
        """
        if self.pre_transform is not None:  # random itself: the order of the draws is that of the views
            pixels = as_float(images)
            return [self._make(self.pre_transform(pixels).clamp(0, 1), 1, sizes, frames)[0] for _ in range(count)]
        return self._make(images.float() if images.is_floating_point() else images, count, sizes, frames)

    def _make(self, images: Tensor, count: int, sizes: NDArray[np.int64] | None, frames: int = 1) -> list[Tensor]:
        batch, channels, height, width = images.shape
        edges = self._shape
        if not uses_accelerator_backend(self.backend, images):
            drawn = [self._draw(images, sizes, frames) for _ in range(count)]
            return self._located([self._in_blocks(images, draw) for draw in drawn], drawn, images, sizes)
        joint = max(1, _JOINT_BYTES // (4 * batch * channels * (height * width + edges[0] * edges[1])))
        views: list[Tensor] = []
        drawn = []
        while len(views) < count:
            draws = [self._draw(images, sizes, frames) for _ in range(min(joint, count - len(views)))]
            drawn += draws
            together = [
                {name: np.concatenate([draw[name] for draw in same]) for name in same[0]}
                for same in zip(*draws, strict=True)
            ]
            result, back = self._compute(images, together)
            views += [result.index_select(0, rows) for rows in back.view(-1, batch).unbind()]
        return self._located(views, drawn, images, sizes)

    def _located(
        self, views: list[Tensor], drawn: list[list[Draw]], images: Tensor, sizes: NDArray[np.int64] | None
    ) -> list[Tensor]:
        """Return the views, each with its boxes if wanted, in pixels of images ``(B, C, H, W)`` before stretching."""
        if not self.locates:
            return views
        stretch = 1.0 if sizes is None else sizes[:, [0, 1, 0, 1]] / np.array(images.shape[-2:] * 2)
        boxes = [np.column_stack([draw[0]["box"] * stretch, draw[0]["flip"]]).astype(np.float32) for draw in drawn]
        moved = to_device({str(place): box for place, box in enumerate(boxes)}, images.device)
        return [LocatedView(view, moved[str(place)]) for place, view in enumerate(views)]

    def _draw(self, images: Tensor, sizes: NDArray[np.int64] | None, frames: int = 1) -> list[Draw]:
        """Draw the parameters of every operation for one view of images ``(B, C, H, W)``, equal for each ``frames``."""
        batch, _, height, width = images.shape
        crop: Any
        crop, *others = self._operations()
        edges, clips = self._shape, batch // frames
        options = {} if sizes is None else {"sizes": sizes[::frames]}
        draws = [
            crop.draw(clips, height, width, **options),
            *(operation.draw(clips, *edges) for operation in others),
        ]
        if frames == 1:
            return draws
        return [{name: np.repeat(value, frames, axis=0) for name, value in draw.items()} for draw in draws]

    def _in_blocks(self, images: Tensor, draws: list[Draw]) -> Tensor:
        """Return one view ``(B, C', h, w)`` of images ``(B, C, H, W)``, computed block by block."""
        keep_freed_memory()
        shape = (len(images), self.factor.shape[1], *self._shape)  # with index channels
        views, batch = torch.empty(shape, device=images.device), len(images)
        blocks = max(1, round(views.numel() * 4 / _BLOCK_BYTES))
        block = max(1, -(-batch // blocks))
        for start in range(0, batch, block):
            part = slice(start, start + block)
            result, back = self._compute(images[part], [{k: v[part] for k, v in draw.items()} for draw in draws])
            torch.index_select(result, 0, back, out=views[part])
        return views

    def _compute(self, images: Tensor, draws: list[Draw]) -> tuple[Tensor, Tensor]:
        """Apply all operations to rows sorted by the work that they need, with one transfer of the parameters.

        Args:
            images: ``(B, C, H, W)``.
            draws: The draw of each operation, with V * B rows: V views of each image, view by view.

        Returns:
            The sorted views ``(V * B, C, h, w)``, and the row ``(V * B,)`` at which to find each of them.
        """
        operations = self._operations()
        keys = [operation.sort_key(draw) for operation, draw in zip(operations, draws, strict=True)]
        key = next((key for key in keys if key is not None), None)
        rows = len(next(iter(draws[0].values())))
        order = np.arange(rows) if key is None else key.argsort(kind="stable")
        plan: Plan = {"offset": self.offset, "factor": self.factor}
        plan |= {"order": order % len(images), "back": order.argsort()}
        for i, (operation, draw) in enumerate(zip(operations, draws, strict=True)):
            sorted_draw = {name: value[order] for name, value in draw.items()}
            plan |= {f"{i}.{name}": value for name, value in operation.prepare(sorted_draw).items()}
        plan = to_device(plan, images.device)
        views = images.index_select(0, plan["order"])
        for i, operation in enumerate(operations):
            prefix = f"{i}."
            mine = {name.removeprefix(prefix): value for name, value in plan.items() if name.startswith(prefix)}
            views = operation.compute_(views, mine)
        if self.normalizes:
            views = torch.addcmul(plan["offset"], views, plan["factor"])
        return views, plan["back"]
