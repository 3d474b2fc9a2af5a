"""Multi-crop batches: global views, then local views of other sizes, one forward pass per size."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.contracts import split_batch


def count_crops(batch: Any, global_views: int) -> int:
    """Return the number of views of a multi-crop batch: global views, then any number of local views of any size.

    Where views have several sizes, the first ``global_views`` must be those that share the first size.

    Args:
        batch: A training batch whose images are a list of views, each ``(B, C, h, w)``.
        global_views: Number of global views that the method needs.

    Raises:
        ValueError: If the batch has fewer views, or more global views.
    """
    images, _ = split_batch(batch)
    if isinstance(images, Tensor):
        return global_views  # `require_views` explains what to add
    hint = f"Give a policy that makes {global_views} global views and then local ones"
    require(len(images) >= global_views, "batch", f"hold at least {global_views} views", len(images), hint)
    sizes = [tuple(view.shape[-2:]) for view in images]
    first = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if first is not None and first > global_views:
        fail("views", f"begin with {global_views} global views", f"{first} of one size: {sizes}", hint)
    return len(images)


def forward_by_size(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Return the output of a network for each view, with one forward pass per run of views of equal size.

    As in the reference implementations of SwAV, DINO and iBOT, consecutive views of one size are concatenated along
    the batch, so BatchNorm computes its statistics over all of them, separately from those of another size.

    Args:
        network: Maps images ``(N, C, h, w)`` to one output row each, ``(N, ...)``.
        views: The views, each ``(B, C, h, w)``; only their sizes may differ.

    Returns:
        One output ``(B, ...)`` per view, in the order of the views.
    """
    outputs: list[Tensor] = []
    for _, run in groupby(views, key=lambda view: view.shape[-2:]):
        group = list(run)
        joined = network(torch.cat(group) if len(group) > 1 else group[0])  # a single view is not copied
        outputs += torch.split(joined, [len(view) for view in group])
    return outputs
