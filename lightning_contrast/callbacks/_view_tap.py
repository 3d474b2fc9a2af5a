"""Reads what a layer gives for all views of a step, without a further forward pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast.callbacks._features import FeatureTap, pool
from lightning_contrast.contracts import split_batch


class ViewTap(FeatureTap):
    """Takes the outputs of a layer for all views of the images of one step.

    All calls of the layer count whose rows are a multiple of the batch, in their order; the rows of one call are the
    views one after the other. So two calls with (B, D) and one call with (2 B, D) give the same.

    Args:
        features: Name of a submodule, as ``named_modules`` gives it.
        limit: Views kept at most, the first ones.
        only_rows: Rows kept of each view, the first ones; None keeps all.
    """

    def __init__(self, features: str, *, limit: int = 2, only_rows: int | None = None) -> None:
        super().__init__(features)
        self.limit, self.only_rows = limit, only_rows
        self._views: list[Tensor] = []

    def arm(self, rows: int) -> None:
        """Expect the outputs for ``rows`` images in the coming step."""
        super().arm(rows)
        self._views = []

    def disarm(self) -> None:
        """Expect nothing."""
        self._armed, self._views = False, []

    def read_views(self) -> Tensor | None:
        """Return the views of the step that has just ended.

        Returns:
            ``(V, R, D)``, float32, detached, with memory of their own: V views of the first R images; None where the
            layer was not called or gave no such tensor.
        """
        views, self._armed, self._views = self._views, False, []
        widths = {view.shape for view in views}
        return torch.stack(views[: self.limit]) if len(widths) == 1 else None

    def refused(self) -> str | None:
        """Return the type or shape of an output of the last step that was none of the images', if there was one."""
        return self._refused

    def _hook(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not self._armed or len(self._views) >= self.limit:
            return
        if not isinstance(output, Tensor) or output.ndim < 2 or self._rows == 0 or len(output) % self._rows:
            self._refused = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
            return
        for view in torch.split(output.detach(), self._rows)[: self.limit - len(self._views)]:
            pooled = pool(view[: self.only_rows], len(view[: self.only_rows]), self.tokens)
            if pooled is not None:
                self._views.append(pooled)


def count_images(batch: Any) -> int:
    """Return the number of images of a batch; of what is not a batch of images, the rows of the first tensor.

    Args:
        batch: Any batch.

    Returns:
        The number, 0 where there is no tensor.
    """
    try:
        images, _ = split_batch(batch)
    except TypeError:
        return _first_rows(batch)
    return len(images) if isinstance(images, Tensor) else len(images[0])


def _first_rows(value: Any) -> int:
    if isinstance(value, Tensor):
        return len(value) if value.ndim else 0
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return next((rows for rows in map(_first_rows, value) if rows), 0)
    return 0
