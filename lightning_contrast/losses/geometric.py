"""Losses on distances and inner products: alignment, uniformity, spectral, triplet and margin losses.

The ``naive_*`` functions are the formulas of the losses that avoid a similarity matrix, for one process; the tests
compare the losses with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch, check_positive, fail
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import check_matrix, check_pair, check_tile_size
from lightning_contrast.losses.kernels.logsumexp import NegativeMask, self_lse
from lightning_contrast.losses.kernels.normalization import normalize_rows
from lightning_contrast.precision import full_precision, normalize


@full_precision
def alignment(z_a: Tensor, z_b: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Compute the mean distance of positive pairs on the unit sphere.

    Implements ``L_align`` of Wang and Isola (https://arxiv.org/abs/2005.10242). Inputs are L2-normalized here.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        alpha: Power of the distance, > 0.

    Returns:
        The mean over the pairs of all ranks, a scalar in [0, 2**alpha].

    Raises:
        ValueError: If the shapes differ or ``alpha`` is not positive.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("z_a", z_a, "z_b", z_b, minimum=1)
    check_positive("alpha", alpha, "The paper uses 2")
    squared = (normalize(z_a) - normalize(z_b)).square().sum(1)
    if alpha == 2:
        return global_mean(squared)
    # Below 2 the derivative at distance 0 is infinite or undefined; clamping to the smallest normal number makes it 0.
    tiny = torch.finfo(squared.dtype).tiny
    return global_mean(torch.where(squared > tiny, squared.clamp_min(tiny).pow(alpha / 2), 0.0))


def naive_uniformity(z: Tensor, *, t: float = 2.0) -> Tensor:
    """Reference form of `uniformity`: materializes the ``(B, B)`` matrix of distances.

    Args:
        z: Embeddings of one view, ``(B, D)``.
        t: Sharpness of the potential, > 0.
    """
    unit = F.normalize(z, dim=1)
    squared = (unit[:, None] - unit).square().sum(2)  # (B, B)
    other = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (-t * squared[other]).exp().mean().log()


@full_precision
def uniformity(z: Tensor, *, t: float = 2.0, tile_size: int | None = None) -> Tensor:
    """Compute the logarithm of the mean Gaussian potential of all pairs.

    Implements ``L_uniform`` of Wang and Isola (https://arxiv.org/abs/2005.10242), over the pairs of the global batch.
    Inputs are L2-normalized here; the matrix of distances is never materialized.

    Args:
        z: Embeddings of one view, ``(B, D)``.
        t: Sharpness of the potential ``exp(-t d^2)``, > 0; 2 in the paper.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        A scalar in [-4 t, 0]; 0 if all embeddings are equal.

    Raises:
        ValueError: If the shape is wrong, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    check_matrix("z", z)
    check_tile_size(tile_size)
    check_positive("t", t, "The paper uses 2")
    if not distributed.is_distributed():
        check_batch("z", len(z))
    unit = normalize_rows(z)
    # d^2 = 2 - 2 cos, so the potentials of a row sum to exp(lse - 2 t).
    rows = self_lse(unit, 2 * t, NegativeMask(tile_size=tile_size)) - 2 * t  # (B,)
    peak = _global_max(rows)
    total = distributed.all_reduce_sum_with_gradient((rows - peak).exp().sum())
    count = _global_count(z)
    return total.log() + peak - (count * (count - 1)).log()


def _global_max(values: Tensor) -> Tensor:
    """Compute the largest value over all ranks, without gradient."""
    return distributed.gather(values).max()


def _global_count(z: Tensor) -> Tensor:
    """Count the rows of all ranks."""
    return distributed.all_reduce_sum(z.new_tensor(float(len(z))))


def naive_spectral_contrastive_loss(z_a: Tensor, z_b: Tensor, *, mu: float) -> Tensor:
    """Reference form of `spectral_contrastive_loss`: materializes the ``(B, B)`` matrix of inner products.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        mu: Square of the largest norm of an embedding, > 0.
    """
    z_a, z_b = (F.normalize(z, dim=1) * z.norm(dim=1, keepdim=True).clamp_max(mu**0.5) for z in (z_a, z_b))
    inner = z_a @ z_b.T  # (B, B)
    other = ~torch.eye(len(inner), dtype=torch.bool, device=inner.device)
    return (inner[other].square().mean() - 2 * inner.diagonal().mean()) / mu


@full_precision
def spectral_contrastive_loss(z_a: Tensor, z_b: Tensor, *, mu: float) -> Tensor:
    """Compute the spectral contrastive loss.

    Implements Eq. 6 of spectral contrastive learning (https://arxiv.org/abs/2106.04156) as the reference
    implementation does: norms larger than ``sqrt(mu)`` are clipped to it, and the loss is divided by ``mu``. The sum
    over all pairs is computed from two ``D x D`` matrices, without a ``B x B`` matrix.
    Differs from it: both terms are over the global batch, not one replica.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``, not normalized.
        z_b: Embeddings of the second view, ``(B, D)``, not normalized.
        mu: Square of the largest norm of an embedding, > 0; 1 for CIFAR and 10 for ImageNet in the paper.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or ``mu`` is not positive.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("z_a", z_a, "z_b", z_b)
    check_positive("mu", mu, "The paper uses 1 for CIFAR and 10 for ImageNet")
    z_a, z_b = (z * mu**0.5 / z.norm(dim=1, keepdim=True).clamp_min(mu**0.5) for z in (z_a, z_b))
    count = _global_count(z_a)
    inner = (z_a * z_b).sum(1)  # (B,)
    # sum_ij (a_i . b_j)^2 = <A'A, B'B>, from which the pairs i = j are subtracted.
    gram_a, gram_b = (distributed.all_reduce_sum_with_gradient(z.T @ z) for z in (z_a, z_b))
    others = (gram_a * gram_b).sum() / (count * (count - 1)) - global_mean(inner.square()) / (count - 1)
    return (others - 2 * global_mean(inner)) / mu


@full_precision
def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, *, margin: float) -> Tensor:
    """Compute the hinge loss on squared distances of triplets of unit vectors.

    Implements Eq. 3 of FaceNet (https://arxiv.org/abs/1503.03832). Inputs are L2-normalized here.

    Args:
        anchor: Embeddings, ``(B, D)``.
        positive: Embeddings of the same class, ``(B, D)``.
        negative: Embeddings of another class, ``(B, D)``.
        margin: Required difference of the squared distances to negative and positive, > 0; 0.2 in the paper.

    Returns:
        The mean over the triplets of all ranks, a scalar, >= 0.

    Raises:
        ValueError: If shapes differ or the margin is not positive.
        TypeError: If the inputs are not floating point.
    """
    check_pair("anchor", anchor, "positive", positive, minimum=1)
    check_pair("anchor", anchor, "negative", negative, minimum=1)
    check_positive("margin", margin, "The paper uses 0.2")
    anchor, positive, negative = normalize(anchor), normalize(positive), normalize(negative)
    # The difference of 2 - 2 cos and 2 - 2 cos': without the twos, near pairs lose no digits.
    gap = 2 * (anchor * (negative - positive)).sum(1)
    return global_mean(F.relu(gap + margin))


@full_precision
def margin_contrastive_loss(z_a: Tensor, z_b: Tensor, same: Tensor, *, margin: float) -> Tensor:
    """Compute the margin-based contrastive loss: similar pairs attract, dissimilar pairs repel up to a margin.

    Implements Eq. 4 of "Dimensionality reduction by learning an invariant mapping" (Hadsell, Chopra and LeCun 2006,
    https://doi.org/10.1109/CVPR.2006.100), with the hinge inside the square. Inputs are not normalized here.

    Args:
        z_a: First of each pair, ``(P, D)``.
        z_b: Second of each pair, ``(P, D)``.
        same: Whether a pair is similar, ``(P,)`` bool, or 0 and 1.
        margin: Distance up to which dissimilar pairs repel, > 0, in the units of the embeddings.

    Returns:
        The mean over the pairs of all ranks, a scalar, >= 0.

    Raises:
        ValueError: If shapes do not match or the margin is not positive.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("z_a", z_a, "z_b", z_b, minimum=1)
    check_positive("margin", margin, "1 is usual for unit vectors")
    if same.shape != (len(z_a),):
        fail("same", f"have shape ({len(z_a)},)", tuple(same.shape), "Pass one value per pair")
    squared = (z_a - z_b).square().sum(1)
    distance = (squared + 1e-12).sqrt()  # the derivative of the root is infinite at 0
    weight = same.to(squared.dtype)
    return global_mean(0.5 * (weight * squared + (1 - weight) * F.relu(margin - distance).square()))
