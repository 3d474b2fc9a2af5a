"""Batches of global and local views, and one pass of a network for each size of them."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.contracts import split_batch
from lightning_contrast.methods.base import ContrastiveModule


def forward_by_size(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Return the output of a network for each view, from one pass for each run of views of equal size.

    As in the programs of SwAV, DINO and iBOT: consecutive views of one size are joined along the batch, so BatchNorm
    takes its statistics over all of them, and those of another size apart.

    Args:
        network: What maps images (N, C, h, w) to one output row each, (N, ...).
        views: The views, each (B, C, h, w); only sizes may differ.

    Returns:
        One output (B, ...) for each view, in the order of the views.
    """
    outputs: list[Tensor] = []
    for _, run in groupby(views, key=lambda view: view.shape[-2:]):
        group = list(run)
        # A single view is not copied; joined views are split again in the order in which they were joined.
        joined = network(torch.cat(group) if len(group) > 1 else group[0])
        outputs += torch.split(joined, [len(view) for view in group])
    return outputs


def require_crops(module: ContrastiveModule, batch: Any, global_views: int = 2) -> list[Tensor]:
    """Return the views of a training batch, global ones first, or say what is wrong with the batch.

    Local views are those that come after the global ones: any number, of any size, none of them needed. Where views
    have several sizes, those that begin with one size are the global ones.

    Args:
        module: The method.
        batch: A training batch.
        global_views: How many global views the method takes.

    Returns:
        At least ``global_views`` views, each (B, C, h, w).

    Raises:
        ValueError: If the batch holds one tensor of images, fewer views, more global views, or views of unequal batch
            sizes.
    """
    images, _ = split_batch(batch)
    if isinstance(images, Tensor):
        return module.views(batch, global_views)  # which says what to add
    mend = f"Give a policy that makes {global_views} global views and then local ones"
    require(len(images) >= global_views, "batch", f"hold at least {global_views} views", len(images), mend)
    sizes = [tuple(view.shape[-2:]) for view in images]
    first = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if first is not None and first > global_views:
        fail("views", f"begin with {global_views} global views", f"{first} of one size: {sizes}", mend)
    return module.views(batch, len(images))
