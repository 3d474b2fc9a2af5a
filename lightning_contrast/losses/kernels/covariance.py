"""Sums of squares of correlation and covariance matrices ``X'Y``, from whichever is smaller.

That is the ``D x D`` matrix itself, or the two ``B x B`` matrices ``XX'`` and ``YY'``, whose inner product the sum is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def off_diagonal_norm(x: Tensor, y: Tensor, diagonal: Tensor) -> Tensor:
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


def variance_covariance(rows: Tensor, *, epsilon: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Compute the variance and the covariance term of VICReg (https://arxiv.org/abs/2105.04906, Eq. 1-4) of one view.

    Args:
        rows: Embeddings of all ranks, ``(B, D)``, B >= 2.
        epsilon: Added to the variances under the square root, > 0; 1e-4 in the paper.

    Returns:
        The mean hinge on the standard deviations, and the sum of the squared off-diagonal covariances over D; scalars.
    """
    count, width = rows.shape
    centered = rows - rows.mean(0)
    squares = centered.square().sum(0)  # (D,)
    variance = F.relu(1 - (squares / (count - 1) + epsilon).sqrt()).mean()
    return variance, off_diagonal_norm(centered, centered, squares) / (count - 1) ** 2 / width
