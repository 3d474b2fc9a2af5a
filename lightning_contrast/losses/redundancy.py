"""Losses on the statistics of embedding dimensions: Barlow Twins and VICReg.

The sum of squares of a correlation or covariance matrix ``X'Y`` is computed from whichever is smaller: the ``D x D``
matrix itself, or the two ``B x B`` matrices ``XX'`` and ``YY'``, whose inner product it is. The ``naive_*`` functions
always materialize the ``D x D`` matrix; they are the formulas, for one process, and the tests compare the losses with
them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch, check_not_negative, check_positive
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import check_pair
from lightning_contrast.precision import full_precision

BATCH_NORM_EPSILON = 1e-5


def _off_diagonal_norm(x: Tensor, y: Tensor, diagonal: Tensor) -> Tensor:
    """Compute the sum of squares of the off-diagonal elements of ``x.T @ y``.

    Args:
        x: Centered rows, ``(B, D)``.
        y: Centered rows, ``(B, D)``.
        diagonal: The diagonal of ``x.T @ y``, ``(D,)``.

    Returns:
        A scalar, >= 0 up to rounding.
    """
    if len(x) >= x.shape[1]:
        product = x.T @ y  # (D, D); not the sum of all squares minus the diagonal's, which cancels without correlations
        return product.masked_fill(torch.eye(len(product), dtype=torch.bool, device=x.device), 0.0).square().sum()
    # With fewer rows than dimensions the matrix is singular, so that the rest is no small part of the sum.
    gram_x = x @ x.T  # (B, B)
    return (gram_x * (gram_x if y is x else y @ y.T)).sum() - diagonal.square().sum()


def _gathered(name: str, x: Tensor) -> Tensor:
    """Gather the rows of all ranks with gradient and check that there are at least 2."""
    rows = distributed.gather_with_gradient(x)
    check_batch(name, len(rows))
    return rows


def naive_barlow_twins_loss(z_a: Tensor, z_b: Tensor, *, off_diagonal_weight: float) -> Tensor:
    """Reference form of `barlow_twins_loss`: materializes the ``(D, D)`` cross-correlation matrix.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        off_diagonal_weight: Weight of the off-diagonal terms, >= 0.
    """
    a, b = (F.batch_norm(z, None, None, training=True, eps=BATCH_NORM_EPSILON) for z in (z_a, z_b))
    correlation = a.T @ b / len(a)  # (D, D)
    identity = torch.eye(len(correlation), dtype=a.dtype, device=a.device)
    weights = identity + off_diagonal_weight * (1 - identity)
    return (weights * (correlation - identity).square()).sum()


@full_precision
def barlow_twins_loss(z_a: Tensor, z_b: Tensor, *, off_diagonal_weight: float) -> Tensor:
    """Compute the distance of the cross-correlation matrix of two views from the identity.

    Implements Eq. 1 of Barlow Twins (https://arxiv.org/abs/2103.03230). Dimensions are standardized over the global
    batch as by BatchNorm without affine parameters (biased variance, epsilon 1e-5).
    Differs from it: under DDP the reference implementation gives 1 / (number of ranks) of the gradient, since its sum
    over ranks is not differentiated; here the mean over ranks is the gradient of one process.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        off_diagonal_weight: Weight of the off-diagonal terms, >= 0; 0.0051 in the paper.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or the weight is negative.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("z_a", z_a, "z_b", z_b)
    check_not_negative("off_diagonal_weight", off_diagonal_weight)
    a, b = (_standardize(_gathered(name, z)) for name, z in (("z_a", z_a), ("z_b", z_b)))
    diagonal = (a * b).sum(0)  # (D,)
    on_diagonal = (1 - diagonal / len(a)).square().sum()
    return on_diagonal + off_diagonal_weight * _off_diagonal_norm(a, b, diagonal) / len(a) ** 2


def _standardize(x: Tensor) -> Tensor:
    """Standardize columns to mean 0 and variance about 1."""
    centered = x - x.mean(0)
    return centered * (centered.square().mean(0) + BATCH_NORM_EPSILON).rsqrt()


def naive_vicreg_loss(
    z_a: Tensor,
    z_b: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    epsilon: float = 1e-4,
) -> Tensor:
    """Reference form of `vicreg_loss`: materializes the ``(D, D)`` covariance matrices.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        invariance_weight: Weight of the mean squared difference, >= 0.
        variance_weight: Weight of the hinge on the standard deviations, >= 0.
        covariance_weight: Weight of the squared off-diagonal covariances, >= 0.
        epsilon: Added to the variances under the square root, > 0; 1e-4 in the paper.
    """
    loss = invariance_weight * F.mse_loss(z_a, z_b)
    for z in (z_a, z_b):
        covariance = z.T.cov()  # (D, D)
        loss = loss + variance_weight * F.relu(1 - (covariance.diagonal() + epsilon).sqrt()).mean() / 2
        squared = covariance.square()
        loss = loss + covariance_weight * (squared.sum() - squared.diagonal().sum()) / z.shape[1]
    return loss


@full_precision
def vicreg_loss(
    z_a: Tensor,
    z_b: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    epsilon: float = 1e-4,
) -> Tensor:
    """Compute the variance-invariance-covariance loss.

    Implements Eq. 6 of VICReg (https://arxiv.org/abs/2105.04906) as the reference implementation does: the
    variance term is the mean over both views, the covariance term the sum, both over the global batch.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        invariance_weight: Weight of the mean squared difference, >= 0.
        variance_weight: Weight of the hinge on the standard deviations, >= 0.
        covariance_weight: Weight of the squared off-diagonal covariances, >= 0.
        epsilon: Added to the variances under the square root, > 0; 1e-4 in the paper.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, a weight is negative, or ``epsilon`` is
            not positive.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("z_a", z_a, "z_b", z_b)
    check_not_negative("invariance_weight", invariance_weight)
    check_not_negative("variance_weight", variance_weight)
    check_not_negative("covariance_weight", covariance_weight)
    check_positive("epsilon", epsilon, "VICReg uses 1e-4")
    invariance = global_mean((z_a - z_b).square().mean(1))
    variance = covariance = z_a.new_zeros(())
    for name, z in (("z_a", z_a), ("z_b", z_b)):
        rows = _gathered(name, z)
        centered = rows - rows.mean(0)
        squares = centered.square().sum(0)  # (D,)
        variance = variance + 0.5 * F.relu(1 - (squares / (len(rows) - 1) + epsilon).sqrt()).mean()
        off_diagonal = _off_diagonal_norm(centered, centered, squares) / (len(rows) - 1) ** 2
        covariance = covariance + off_diagonal / rows.shape[1]
    total = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    return torch.as_tensor(total)
