"""Losses that draw the embeddings of a batch towards a standard Gaussian, along random directions: SIGReg and VISReg.

A direction is a unit vector; a slice is the projection of the rows on it. Cramér and Wold: a distribution is a Gaussian
if and only if all its slices are. Ranks must use the same directions; the statistics are those of the global batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_batch, check_positive, check_probability, fail, require
from lightning_contrast.losses.checks import check_floating, check_matrix
from lightning_contrast.precision import full_precision
from lightning_contrast.seeding import send

_EPSILON = 1e-6  # added to the standard deviations, as in VISReg's reference implementation


def draw_directions(z: Tensor, *, slices: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw the ``directions`` of `sigreg_loss` and `visreg_loss`, uniformly on the sphere, on the CPU.

    Args:
        z: Embeddings, ``(..., D)``, of which only width, dtype and device are used.
        slices: K, number of directions, >= 1.
        generator: Generator of the CPU, equal on all ranks; None is torch's global one.

    Returns:
        Unit columns, ``(D, K)``, float32 or float64, on the device of ``z``.

    Raises:
        ValueError: If there is no slice.
    """
    check_at_least("slices", slices, 1)
    columns = F.normalize(
        torch.randn(z.shape[-1], slices, generator=generator, dtype=torch.float32, device="cpu"), dim=0
    )
    return send(columns.to(torch.promote_types(z.dtype, torch.float32)), z.device)


def _check_views(name: str, z: Tensor, dims: tuple[int, ...] = (3,)) -> None:
    """Check embeddings of several views, or of one view if that is allowed."""
    check_floating(name, z)
    shapes = {2: "(N, D)", 3: "(views, N, D)"}
    ok = z.ndim in dims and (z.ndim == 2 or len(z) > 0)
    rule = f"have the shape {' or '.join(shapes[n] for n in dims)}"
    require(ok, name, rule, tuple(z.shape), "Stack the embeddings of the views, one row per image")


def _check_directions(z: Tensor, directions: Tensor) -> None:
    """Check directions ``(D, K)`` for embeddings ``(..., D)``."""
    check_matrix("directions", directions)
    if directions.shape[0] != z.shape[-1] or directions.shape[1] < 1:
        rule = f"have the shape ({z.shape[-1]}, slices) with at least one slice"
        fail("directions", rule, tuple(directions.shape), "Draw them with `draw_directions`")


@full_precision
def epps_pulley(x: Tensor, *, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """Compute the Epps-Pulley statistic of each column: its distance from a standard Gaussian.

    ``N`` times the integral over t of the squared distance between the empirical characteristic function and
    ``exp(-t**2 / 2)``, weighted by the latter, by the trapezoidal rule on ``knots`` points of [0, t_max] and doubled
    for the negative half. It is about 1.05 for a Gaussian column and 0.402 N for zeros, and bounded: far outliers and
    a column that has collapsed have almost no gradient.

    Source: https://arxiv.org/abs/2511.08544 and https://github.com/rbalestr-lab/lejepa.

    Args:
        x: Samples, ``(N, K)`` or ``(views, N, K)``; N is summed over ranks.
        knots: Number of points of the integral, >= 2.
        t_max: End of the integral, > 0.

    Returns:
        The statistics, ``(K,)`` or ``(views, K)``, >= 0, the same on every rank.

    Raises:
        ValueError: If the shape or a number is out of range.
        TypeError: If the samples are not floating point.
    """
    _check_views("x", x, (2, 3))
    check_at_least("knots", knots, 2)
    check_positive("t_max", t_max)
    step = t_max / (knots - 1)
    t = torch.arange(knots, dtype=x.dtype, device=x.device) * step  # (T,)
    target = (-t.square() / 2).exp()  # (T,): the characteristic function of a standard Gaussian, which is real
    weights = target * F.pad(t.new_full((knots - 2,), 2 * step), (1, 1), value=step)  # (T,)
    angles = x.unsqueeze(-1) * t  # (..., N, K, T)
    sums = torch.stack([angles.cos().sum(-3), angles.sin().sum(-3)])  # (2, ..., K, T)
    count = distributed.all_reduce_sum(t.new_full((), x.shape[-2]))
    real, imaginary = distributed.all_reduce_sum_with_gradient(sums) / count  # (..., K, T) each
    statistics: Tensor = count * (weights * ((real - target).square() + imaginary.square())).sum(-1)
    return statistics


@full_precision
def sigreg_loss(z: Tensor, directions: Tensor, *, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """Compute SIGReg: the mean Epps-Pulley statistic over slices, and over views.

    Implements Sketched Isotropic Gaussian Regularization of LeJEPA (https://arxiv.org/abs/2511.08544) as the reference
    implementation does: for each view with its N images, so that views of one image do not count as samples, and
    without standardization. It grows with N for embeddings that are not Gaussian.

    Args:
        z: Embeddings, ``(N, D)`` or ``(views, N, D)``; N is summed over ranks.
        directions: Unit columns, ``(D, K)``, the same on every rank.
        knots: As in `epps_pulley`.
        t_max: As in `epps_pulley`.

    Returns:
        A scalar, >= 0, the same on every rank.

    Raises:
        ValueError: If a shape or a number is out of range.
        TypeError: If the embeddings are not floating point.

    Example:
        >>> z = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
        >>> directions = draw_directions(z, slices=64, generator=torch.Generator().manual_seed(1))
        >>> bool(sigreg_loss(z, directions) < sigreg_loss(2 * z, directions))
        True
    """
    _check_views("z", z, (2, 3))
    _check_directions(z, directions)
    return epps_pulley(z @ directions, knots=knots, t_max=t_max).mean()


@full_precision
def view_invariance(global_projection: Tensor, local_projection: Tensor | None = None) -> Tensor:
    """Compute the mean squared distance of all views from the mean of the global views.

    The invariance term of LeJEPA and VISReg. The mean has gradient.

    Args:
        global_projection: Embeddings of the global views, ``(V_g, N, D)``.
        local_projection: Embeddings of the local views, ``(V_l, N, D)``; None if there are none.

    Returns:
        The mean over views, images of all ranks and dimensions, a scalar, the same on every rank.

    Raises:
        ValueError: If a shape is another one.
        TypeError: If the embeddings are not floating point.
    """
    every = _all_views(global_projection, local_projection)
    return distributed.global_mean((every - global_projection.mean(0)).square().mean((0, 2)))


def _all_views(global_projection: Tensor, local_projection: Tensor | None) -> Tensor:
    """Return all views, (V, N, D)."""
    _check_views("global_projection", global_projection)
    if local_projection is None:
        return global_projection
    _check_views("local_projection", local_projection)
    if local_projection.shape[1:] != global_projection.shape[1:]:
        rule = f"have the shape (views, {', '.join(map(str, global_projection.shape[1:]))}) as the global views"
        fail("local_projection", rule, tuple(local_projection.shape), "Embed the same images in every view")
    return torch.cat([global_projection, local_projection])


@full_precision
def lejepa_loss(
    global_projection: Tensor,
    local_projection: Tensor | None,
    directions: Tensor,
    *,
    regularizer_weight: float,
    knots: int = 17,
    t_max: float = 3.0,
) -> Tensor:
    """Compute LeJEPA's loss: invariance of the views, and SIGReg of each.

    ``regularizer_weight * sigreg_loss + (1 - regularizer_weight) * view_invariance``, over all views
    (https://arxiv.org/abs/2511.08544).

    Args:
        global_projection: Embeddings of the global views, ``(V_g, N, D)``.
        local_projection: Embeddings of the local views, ``(V_l, N, D)``; None if there are none.
        directions: Unit columns, ``(D, K)``, the same on every rank.
        regularizer_weight: Share of SIGReg, in [0, 1]; 0.05 or 0.02 in the reference implementation.
        knots: As in `epps_pulley`.
        t_max: As in `epps_pulley`.

    Returns:
        A scalar, >= 0, the same on every rank.

    Raises:
        ValueError: If a shape or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    check_probability("regularizer_weight", regularizer_weight)
    regularizer = sigreg_loss(_all_views(global_projection, local_projection), directions, knots=knots, t_max=t_max)
    invariance = view_invariance(global_projection, local_projection)
    return regularizer_weight * regularizer + (1 - regularizer_weight) * invariance


def _all_rows(z: Tensor, directions: Tensor) -> Tensor:
    """Return the embeddings of all ranks, (V, N, D), after checking them."""
    _check_views("z", z)
    _check_directions(z, directions)
    rows = distributed.gather_with_gradient(z.transpose(0, 1)).transpose(0, 1)
    check_batch("z", rows.shape[1])
    return rows


def _quantile_distance(rows: Tensor, directions: Tensor) -> Tensor:
    """Return the mean squared distance of the sorted slices of rows (V, N, D) from the quantiles of a Gaussian."""
    count = rows.shape[1]
    quantiles = torch.special.ndtri(torch.arange(1, count + 1, dtype=rows.dtype, device=rows.device) / (count + 1))
    slices = (rows @ directions).sort(dim=1).values  # (V, N, K)
    distance: Tensor = (slices - quantiles[:, None]).square().mean()
    return distance


@full_precision
def sliced_gaussian_loss(z: Tensor, directions: Tensor) -> Tensor:
    """Compute the sliced Wasserstein distance of the embeddings from a standard Gaussian, squared.

    The mean over views, slices and images of the squared distance of the sorted slices from the Gaussian's quantiles
    ``i / (N + 1)``: the baseline of VISReg, without its terms of scale and center.

    Source: https://github.com/HaiyuWu/visreg (``swd.py``).

    Args:
        z: Embeddings, ``(views, N, D)``; N is summed over ranks and >= 2.
        directions: Unit columns, ``(D, K)``, the same on every rank.

    Returns:
        A scalar, >= 0, the same on every rank.

    Raises:
        ValueError: If a shape is another one, or the batch is smaller than 2.
        TypeError: If the embeddings are not floating point.
    """
    return _quantile_distance(_all_rows(z, directions), directions)


@full_precision
def visreg_loss(z: Tensor, directions: Tensor) -> Tensor:
    """Compute VISReg's regularizer: center, scale and shape of the embeddings of each view are those of a Gaussian.

    The mean over dimensions of the squared mean, plus that of ``(std - 1)**2``, plus `sliced_gaussian_loss` of the
    standardized embeddings, whose standard deviation has no gradient. Unlike that of SIGReg its gradient grows as
    embeddings collapse. Of Gaussian embeddings it is 0.013 with 256 images, 0.21 with 16; of equal ones about 2.

    Source: https://github.com/HaiyuWu/visreg (``visreg.py``).
    Differs from it: all ranks use the same directions, so that they equal one process; there each draws its own.

    Args:
        z: Embeddings, ``(views, N, D)``; N is summed over ranks and >= 2.
        directions: Unit columns, ``(D, K)``, the same on every rank.

    Returns:
        A scalar, >= 0, the same on every rank.

    Raises:
        ValueError: If a shape is another one, or the batch is smaller than 2.
        TypeError: If the embeddings are not floating point.
    """
    rows = _all_rows(z, directions)
    mean = rows.mean(1, keepdim=True)  # (V, 1, D)
    centered = rows - mean
    std = torch.linalg.vector_norm(centered, dim=1, keepdim=True) / math.sqrt(rows.shape[1]) + _EPSILON
    shape = _quantile_distance(centered / std.detach(), directions)
    total: Tensor = mean.square().mean() + (std - 1).square().mean() + shape
    return total
