"""Losses on grids of features: DenseCL's contrast of matched cells, VICRegL's global and local terms."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_batch, check_not_negative, require
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import Scalar, check_floating, check_views
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


_EPSILON = 1e-4  # added to variances, as in VICReg


@full_precision
def vicregl_global_loss(
    embeddings: Sequence[Tensor] | Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> Tensor:
    """Compute VICRegL's loss of the embeddings of whole views.

    Implements the global part of VICRegL (https://arxiv.org/abs/2210.01571) as the reference implementation does: the
    invariance is the mean over ordered pairs of one of the first two views and any other view; the variance and the
    covariance are means over views, which is twice VICReg's variance and half of its covariance for two views.

    Args:
        embeddings: V >= 2 embeddings ``(B, D)``, those of the two large views first; or a tensor ``(V, B, D)``.
        invariance_weight: Weight of the mean squared difference, >= 0.
        variance_weight: Weight of the hinge on the standard deviations, >= 0.
        covariance_weight: Weight of the squared off-diagonal covariances, >= 0.

    Returns:
        A scalar over the images of all ranks, the same on every rank.

    Raises:
        ValueError: If there are fewer than 2 views or images, shapes differ, or a weight is negative.
        TypeError: If the embeddings are not floating point.
    """
    views = list(embeddings)
    check_views("embeddings", views, 2)
    _check_weights(invariance_weight, variance_weight, covariance_weight)
    squares = [global_mean((views[i] - views[j]).square().mean(1)) for i, j in _pairs(len(views))]
    terms = [_regularization(view[:, None], variance_weight, covariance_weight) for view in views]
    return invariance_weight * torch.stack(squares).mean() + torch.stack(terms).mean()


@full_precision
def vicregl_local_loss(
    maps: Sequence[Tensor] | Tensor,
    locations: Sequence[Tensor] | Tensor | None,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    matches: tuple[int, int] = (20, 4),
    all_feature_matches: bool = True,
) -> Tensor:
    """Compute VICRegL's loss of cells that are matched by their features, and by their places in the image.

    Implements Eq. 2 to 5 of VICRegL (https://arxiv.org/abs/2210.01571) as the reference implementation does without its
    option ``fast_vc_reg``. For each ordered pair of views, of which the first is one of the first two, every cell of a
    view is matched with the nearest cell of the other one, in both directions; of these matches the nearest are kept.
    The m-th match of all images forms a batch, in the order of the cells, with VICReg's three terms.

    Args:
        maps: V >= 2 maps ``(B, S, C)`` of cells, those of the two large views first; S may differ between views.
        locations: Where in its image the cells are, ``(B, h, w, 2)`` with ``h w = S`` per view, in any unit; None
            matches by features only.
        invariance_weight: Weight of the mean squared difference, >= 0.
        variance_weight: Weight of the hinge on the standard deviations, >= 0.
        covariance_weight: Weight of the squared off-diagonal covariances, >= 0.
        matches: How many matches are kept of the cells of the first and of the second view of a pair, >= 1 and at most
            the number of their cells.
        all_feature_matches: Keep the matches of all cells where they are matched by features.

    Returns:
        A scalar over the images of all ranks, the same on every rank: the sum of both kinds of matches, each the mean
        over pairs of views and both directions.

    Raises:
        ValueError: If there are fewer than 2 views or images, shapes do not match, or a number is out of range.
        TypeError: If maps or locations are not floating point.
    """
    cells = list(maps)
    places = None if locations is None else [place.flatten(1, 2) for place in locations]
    _check_weights(invariance_weight, variance_weight, covariance_weight)
    _check_cells(cells, places, matches)

    def pair_loss(x: Tensor, y: Tensor, distance: Tensor, keep: int | None) -> Tensor:
        """Return the loss of the cells of x ``(B, S, C)`` with their nearest ones of y, by distance ``(B, S, T)``."""
        nearest, match = distance.min(2)  # (B, S)
        kept = _nearest_rows(nearest, x.shape[1] if keep is None else keep)  # (B, M)
        mine = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        others = y.gather(1, match.gather(1, kept)[..., None].expand(-1, -1, y.shape[2]))
        terms = [_regularization(side, variance_weight, covariance_weight) / 2 for side in (mine, others)]
        return invariance_weight * global_mean((mine - others).square().mean((1, 2))) + terms[0] + terms[1]

    losses = []
    counts = (None, None) if all_feature_matches else matches
    for i, j in _pairs(len(cells)):
        spaces = [(cells, counts)] if places is None else [(cells, counts), (places, matches)]
        for points, (first, second) in spaces:
            distance = torch.cdist(points[i].detach(), points[j].detach())  # (B, S, T)
            losses.append(pair_loss(cells[i], cells[j], distance, first))
            losses.append(pair_loss(cells[j], cells[i], distance.mT, second))
    return torch.stack(losses).sum() / (2 * len(_pairs(len(cells))))


def _pairs(views: int) -> list[tuple[int, int]]:
    """Return the ordered pairs of one of the first two views and any other view."""
    return [(i, j) for i in range(2) for j in range(views) if i != j]


def _nearest_rows(distance: Tensor, count: int) -> Tensor:
    """Return the indices ``(B, count)`` of the smallest entries of ``(B, S)``, in ascending order."""
    return distance.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def _regularization(rows: Tensor, variance_weight: float, covariance_weight: float) -> Tensor:
    """Return VICReg's variance and covariance terms of ``(B, M, C)`` over the images of all ranks, a mean over M."""
    rows = distributed.gather_with_gradient(rows)
    check_batch("embeddings", len(rows))
    centered = (rows - rows.mean(0)).transpose(0, 1)  # (M, N, C)
    covariance = centered.mT @ centered / (len(rows) - 1)  # (M, C, C)
    variances = covariance.diagonal(dim1=1, dim2=2)  # (M, C)
    hinge = F.relu(1 - (variances + _EPSILON).sqrt()).mean()
    itself = torch.eye(covariance.shape[1], dtype=torch.bool, device=rows.device)
    off_diagonal = covariance.masked_fill(itself, 0.0).square().sum((1, 2)) / covariance.shape[1]
    return variance_weight * hinge + covariance_weight * off_diagonal.mean()


def _check_weights(invariance: float, variance: float, covariance: float) -> None:
    """Check the weights of the three terms."""
    check_not_negative("invariance_weight", invariance)
    check_not_negative("variance_weight", variance)
    check_not_negative("covariance_weight", covariance)


def _check_cells(cells: list[Tensor], places: list[Tensor] | None, matches: tuple[int, int]) -> None:
    """Check maps ``(B, S, C)``, places ``(B, S, 2)`` and numbers of matches."""
    require(len(cells) >= 2, "maps", "be a list of at least 2 maps", len(cells), "Pass one map (B, S, C) per view")
    require(len(matches) == 2, "matches", "be two numbers", matches, "Give those of the first and the second view")
    for view in cells:
        check_floating("maps", view)
        hint = "Flatten the maps and put the channels last"
        same = view.ndim == 3 and (len(view), view.shape[2]) == (len(cells[0]), cells[0].shape[-1])
        require(same, "maps", "be (B, S, C) with one B and C", [tuple(v.shape) for v in cells], hint)
    for place, view in zip(places or [], cells, strict=places is not None):
        check_floating("locations", place)
        hint = "Give the row and column of every cell"
        rule = f"be (B, h, w, 2) with {view.shape[1]} cells"
        require(place.shape == (*view.shape[:2], 2), "locations", rule, tuple(place.shape), hint)
    least = min(view.shape[1] for view in cells[:2]), min(view.shape[1] for view in cells)
    for number, most in zip(matches, least, strict=True):
        check_at_least("matches", number, 1)
        require(number <= most, "matches", f"be at most the {most} cells of a view", matches, "Match fewer cells")
