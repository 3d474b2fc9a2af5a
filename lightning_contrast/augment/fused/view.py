"""One random view of each image by fused operations."""

import functools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_contrast.augment.fused.base import (
    Backend,
    Draw,
    FusedOperation,
    Plan,
    to_device,
    uses_accelerator_backend,
)
from lightning_contrast.augment.images import as_float

_BLOCK_BYTES = 1 << 23  # of float32 views: smaller blocks pay more starts of operations, larger ones leave the cache


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc keep the memory of temporary tensors for the next ones, once in a process.

    By default it returns blocks of this size to the system and gets them back page by page, which took a quarter of
    the time of a batch of views. It stops that for all blocks up to the largest, at most 32 MiB, that was ever freed;
    the block freed here is never touched and therefore costs nothing. Elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


class FusedView(nn.Module):
    """One random view of each image by fused operations.

    All random numbers are drawn first, on the host; what the device needs of them goes there in one copy. On a CPU
    the operations run on blocks of images, so that memory stays bounded and near the processor.

    Args:
        crop: Makes the view's pixels from the image; has a ``size``.
        operations: What follows, in order.
        mean: Subtracted at the end, one number a channel.
        std: Divided by at the end, one number a channel.
        pre_transform: What the images go through first, as floats.
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
        for operation in self._operations():
            operation.backend = backend
        self.offset = np.array([-m / s for m, s in zip(mean, std, strict=True)], np.float32).reshape(1, -1, 1, 1)
        self.factor = np.array([1 / s for s in std], np.float32).reshape(1, -1, 1, 1)
        self.normalizes = bool((self.offset != 0).any() or (self.factor != 1).any())

    def _operations(self) -> list[FusedOperation]:
        return [cast("FusedOperation", operation) for operation in self.operations]

    def forward(self, images: Tensor) -> Tensor:
        """Return the views ``(B, C, size, size)`` of ``images`` ``(B, C, H, W)``, uint8 or float."""
        if self.pre_transform is not None:
            images = self.pre_transform(as_float(images)).clamp_(0, 1)
        batch, channels, height, width = images.shape
        size = int(cast("Any", self.operations[0]).size)
        draws = [self._operations()[0].draw(batch, height, width)]
        draws += [operation.draw(batch, size, size) for operation in self._operations()[1:]]
        images = images.float() if images.is_floating_point() else images
        if uses_accelerator_backend(self.backend, images):
            return self._compute(images, draws)
        keep_freed_memory()
        views = torch.empty(batch, channels, size, size, device=images.device)
        blocks = max(1, round(batch * channels * size * size * 4 / _BLOCK_BYTES))
        block = max(1, -(-batch // blocks))
        for start in range(0, batch, block):
            part = slice(start, start + block)
            self._compute(images[part], [{k: v[part] for k, v in draw.items()} for draw in draws], out=views[part])
        return views

    def _compute(self, images: Tensor, draws: list[Draw], out: Tensor | None = None) -> Tensor:
        """Apply all operations to sorted images, with one transfer of their parameters, and put them back in order."""
        operations = self._operations()
        keys = [operation.sort_key(draw) for operation, draw in zip(operations, draws, strict=True)]
        key = next((key for key in keys if key is not None), np.zeros(len(images)))
        order = key.argsort(kind="stable")
        plan: Plan = {"offset": self.offset, "factor": self.factor, "order": order, "back": order.argsort()}
        for i, (operation, draw) in enumerate(zip(operations, draws, strict=True)):
            sorted_draw = {name: value[order] for name, value in draw.items()}
            plan |= {f"{i}.{name}": value for name, value in operation.prepare(sorted_draw).items()}
        plan = to_device(plan, images.device)
        images = images.index_select(0, plan["order"])
        for i, operation in enumerate(operations):
            prefix = f"{i}."
            mine = {name.removeprefix(prefix): value for name, value in plan.items() if name.startswith(prefix)}
            images = operation.compute_(images, mine)
        if self.normalizes:
            images = torch.addcmul(plan["offset"], images, plan["factor"])
        return torch.index_select(images, 0, plan["back"], out=out)
