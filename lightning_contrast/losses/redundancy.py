"""Losses on the statistics of the embedding's dimensions: Barlow Twins and VICReg.

Sums of squares of a correlation or covariance matrix ``X'Y`` are taken from whichever is smaller: the ``D x D`` matrix
itself, or the two ``B x B`` matrices ``XX'`` and ``YY'``, of which they are the inner product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch, check_not_negative
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import check_pair
from lightning_contrast.precision import full_precision

BATCH_NORM_EPSILON = 1e-5
VARIANCE_EPSILON = 1e-4


def _product_norm(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of squares of ``x.T @ y`` for ``x``, ``y`` ``(B, D)``."""
    if len(x) >= x.shape[1]:
        return (x.T @ y).square().sum()
    gram_x = x @ x.T
    return (gram_x * (gram_x if y is x else y @ y.T)).sum()


def _joined(name: str, x: Tensor) -> Tensor:
    """Return the rows of all ranks with gradient, of which there must be 2."""
    rows = distributed.gather_with_gradient(x)
    check_batch(name, len(rows))
    return rows


@full_precision
def barlow_twins_loss(z_a: Tensor, z_b: Tensor, *, off_diagonal_weight: float) -> Tensor:
    """Return the distance of the cross-correlation of two views to the identity.

    Implements Eq. 1 of Barlow Twins (https://arxiv.org/abs/2103.03230). Dimensions are standardised over the global
    batch as by BatchNorm without affine parameters (biased variance, epsilon 1e-5).
    Differs from it: under DDP the authors' program gives 1 / (number of ranks) of the gradient, since its sum over
    ranks is not differentiated; here the mean over ranks is the gradient of one process.

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
    a, b = (_standardize(_joined(name, z)) for name, z in (("z_a", z_a), ("z_b", z_b)))
    diagonal = (a * b).mean(0)  # (D,)
    everything = _product_norm(a, b) / len(a) ** 2
    on_diagonal = (1 - diagonal).square().sum()
    return on_diagonal + off_diagonal_weight * (everything - diagonal.square().sum())


def _standardize(x: Tensor) -> Tensor:
    """Return columns of mean 0 and variance about 1."""
    centred = x - x.mean(0)
    return centred * (centred.square().mean(0) + BATCH_NORM_EPSILON).rsqrt()


@full_precision
def vicreg_loss(
    z_a: Tensor,
    z_b: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> Tensor:
    """Return the variance-invariance-covariance loss.

    Implements Eq. 6 of VICReg (https://arxiv.org/abs/2105.04906) as in the authors' program: the variance term is the
    mean of both views, the covariance term their sum, both over the global batch.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        invariance_weight: Weight of the mean squared difference, >= 0.
        variance_weight: Weight of the hinge on the standard deviations, >= 0.
        covariance_weight: Weight of the squared off-diagonal covariances, >= 0.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a weight is negative.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("z_a", z_a, "z_b", z_b)
    check_not_negative("invariance_weight", invariance_weight)
    check_not_negative("variance_weight", variance_weight)
    check_not_negative("covariance_weight", covariance_weight)
    invariance = global_mean((z_a - z_b).square().mean(1))
    variance = covariance = z_a.new_zeros(())
    for name, z in (("z_a", z_a), ("z_b", z_b)):
        rows = _joined(name, z)
        centred = rows - rows.mean(0)
        variances = centred.square().sum(0) / (len(rows) - 1)  # (D,)
        variance = variance + 0.5 * F.relu(1 - (variances + VARIANCE_EPSILON).sqrt()).mean()
        off_diagonal = _product_norm(centred, centred) / (len(rows) - 1) ** 2 - variances.square().sum()
        covariance = covariance + off_diagonal / rows.shape[1]
    total = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    return torch.as_tensor(total)
