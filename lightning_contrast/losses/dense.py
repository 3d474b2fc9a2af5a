"""Losses on grids of features: DenseCL's contrast of matched cells."""

import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import require
from lightning_contrast.losses.checks import Scalar, check_floating
from lightning_contrast.losses.contrastive import info_nce
from lightning_contrast.losses.labels import global_classes
from lightning_contrast.precision import full_precision


@full_precision
def dense_info_nce(
    query_grid: Tensor,
    key_grid: Tensor,
    query_backbone: Tensor,
    key_backbone: Tensor,
    queue: Tensor | None = None,
    *,
    temperature: Scalar,
    queue_mask: Tensor | None = None,
) -> Tensor:
    """Compute the InfoNCE loss of the cells of a map with their matches in the map of another view.

    Implements Eq. 2 and 3 of DenseCL (https://arxiv.org/abs/2011.09157). The positive of a query cell is the key vector
    of the cell whose backbone features have the largest cosine similarity with its own; the negatives are one vector
    per image. All inputs are L2-normalized here. Keys, queue and matching receive no gradient in DenseCL.

    Args:
        query_grid: Projections of the cells of the query view, ``(B, D, S)``.
        key_grid: Projections of the cells of the key view, ``(B, D, S)``.
        query_backbone: Backbone features of the cells of the query view, ``(B, C, S)``.
        key_backbone: Backbone features of the cells of the key view, ``(B, C, S)``.
        queue: Negatives, ``(K, D)``, the same on every rank, each the mean key vector of an image; None: those of the
            other images of the global batch.
        temperature: Divisor of the cosine similarities; unitless, > 0; a number, or a learned tensor with one element.
        queue_mask: Which rows of the queue count, ``(K,)`` bool.

    Returns:
        The mean over the cells of the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not match or a number is out of range.
        TypeError: If the maps are not floating point.
    """
    _check_grids(query_grid, key_grid, query_backbone, key_backbone)
    size, _, cells = query_grid.shape
    match = F.normalize(query_backbone, dim=1).mT @ F.normalize(key_backbone, dim=1)  # (B, S, S)
    index = match.detach().argmax(2)  # (B, S)
    positives = key_grid.gather(2, index[:, None].expand_as(query_grid))  # (B, D, S)
    own = others = None
    if queue is None:
        queue = distributed.gather(key_grid.mean(2))  # (global B, D)
        image, others = global_classes(None, size, query_grid.device)  # an image is no negative of its own cells
        own = image.repeat_interleave(cells)
    return info_nce(
        query_grid.mT.flatten(0, 1),
        positives.mT.flatten(0, 1),
        queue,
        temperature=temperature,
        negatives_mask=queue_mask,
        groups=own,
        negatives_groups=others,
    )


def _check_grids(query: Tensor, key: Tensor, query_backbone: Tensor, key_backbone: Tensor) -> None:
    """Check projections ``(B, D, S)`` and backbone features ``(B, C, S)`` of the cells of two views."""
    grids = {"query_grid": query, "key_grid": key, "query_backbone": query_backbone, "key_backbone": key_backbone}
    for name, grid in grids.items():
        check_floating(name, grid)
    require(query.ndim == 3 and query.numel() > 0, "query_grid", "be (B, D, S)", tuple(query.shape), "Flatten the maps")
    for name, grid, like in (("key_grid", key, query), ("key_backbone", key_backbone, query_backbone)):
        require(grid.shape == like.shape, name, f"be {tuple(like.shape)}", tuple(grid.shape), "Use views of one size")
    size, _, cells = query.shape
    places = (query_backbone.shape[0], *query_backbone.shape[2:])
    hint = "Give the features of which the projections were made"
    require(places == (size, cells), "query_backbone", f"be ({size}, C, {cells})", tuple(query_backbone.shape), hint)
