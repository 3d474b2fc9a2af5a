"""Multi-crop batches: global views, then local views of other sizes, one forward pass per size."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.contracts import split_batch


def count_crops(batch: Any, global_views: int | None = None) -> int:
    """Return the number of views of a multi-crop batch: global views, then any number of local views of any size.

    Where views have several sizes, the global views are those that share the first size, and come before all others.

    Args:
        batch: A training batch whose images are a list of views, each ``(B, C, h, w)``.
        global_views: Number of global views that the method needs; None: two or more.

    Raises:
        ValueError: If the batch has fewer views, another number of global views, or global views after local ones.
    """
    images, _ = split_batch(batch)
    least = 2 if global_views is None else global_views
    if isinstance(images, Tensor):
        return least  # `require_views` explains what to add
    hint = f"Give a policy that makes {least} global views and then local ones"
    require(len(images) >= least, "batch", f"hold at least {least} views", len(images), hint)
    sizes = [tuple(view.shape[-2:]) for view in images]
    if global_views is None:
        leading = count_global_views(images)
        ordered = leading >= 2 and sizes[0] not in sizes[max(2, leading) :]
        require(ordered, "views", "begin with all global views, two or more of one size", sizes, hint)
        return len(images)
    first = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if first is not None and first > global_views:
        fail("views", f"begin with {global_views} global views", f"{first} of one size: {sizes}", hint)
    return len(images)


def count_global_views(views: Sequence[Tensor]) -> int:
    """Return the number of global views: those of the first view's size, which come first; of two views, both.

    Args:
        views: The views of a batch, each ``(B, C, h, w)``.
    """
    if len(views) == 2:
        return 2
    return next((i for i, view in enumerate(views) if view.shape[-2:] != views[0].shape[-2:]), len(views))


def view_pairs(views: Sequence[Tensor], *, both_ways: bool) -> list[tuple[int, int]]:
    """Return the pairs of views that a loss compares: all pairs of views of which at least one is global.

    Two global views are one pair, or two if a pair has a direction. As in solo-learn, local views are compared with
    the global ones and not with each other, since two small crops may have nothing in common.

    Args:
        views: The views of a batch, each ``(B, C, h, w)``, the global ones first.
        both_ways: False: pairs (i, j) with i < j, i global. True: pairs (i, j) of any view i and a global view j, such
            as a prediction and its target, so that two global views are a pair in both directions.

    Returns:
        Indices of views, in order.
    """
    count = count_global_views(views)
    if both_ways:
        return [(i, j) for i in range(len(views)) for j in range(count) if i != j]
    return [(i, j) for i in range(count) for j in range(i + 1, len(views))]


def mean_loss(losses: Iterable[Tensor]) -> Tensor:
    """Return the mean of losses, such as those of all `view_pairs`, a scalar.

    Args:
        losses: Scalars, at least one.
    """
    return torch.stack(list(losses)).mean()


def forward_each(views: Sequence[Tensor], *networks: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    """Return the outputs of a chain of networks, with a forward pass of the whole chain for one view after the other.

    BatchNorm computes its statistics for each view.

    Args:
        views: The views, each ``(B, C, h, w)``.
        *networks: A backbone, which maps ``(B, C, h, w)`` to ``(B, F)``, and heads, each of which maps the output of
            the network before it.

    Returns:
        For each network one output ``(B, ...)`` per view.
    """
    outputs: list[list[Tensor]] = [[] for _ in networks]
    for view in views:
        rows = view
        for network, found in zip(networks, outputs, strict=True):
            rows = network(rows)
            found.append(rows)
    return outputs


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
