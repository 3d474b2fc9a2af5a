"""Losses on the statistics of embedding dimensions: Barlow Twins, VICReg, TiCo, W-MSE, MMCR and the coding rate.

The ``naive_*`` functions always materialize the ``D x D`` matrix; they are the formulas, for one process, and the tests
compare the losses with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import (
    check_at_least,
    check_batch,
    check_not_negative,
    check_positive,
    check_probability,
    check_same_shape,
    fail,
    require,
)
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import check_floating, check_matrix, check_pair
from lightning_contrast.losses.kernels.covariance import off_diagonal_norm, variance_covariance
from lightning_contrast.precision import full_precision, normalize
from lightning_contrast.seeding import send

BATCH_NORM_EPSILON = 1e-5


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
    return on_diagonal + off_diagonal_weight * off_diagonal_norm(a, b, diagonal) / len(a) ** 2


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
        hinge, covariances = variance_covariance(_gathered(name, z), epsilon=epsilon)
        variance, covariance = variance + 0.5 * hinge, covariance + covariances
    total = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    return torch.as_tensor(total)


@full_precision
def tico_loss(
    query: Tensor,
    key: Tensor,
    covariance: Tensor,
    *,
    covariance_momentum: float = 0.9,
    covariance_weight: float = 8.0,
    detach_covariance: bool = False,
) -> Tensor:
    """Compute TiCo's loss: agreement of two views, and little energy along the directions that recent batches use.

    ``-mean(q k) + covariance_weight * mean(q' C q)`` of unit rows, with ``C = momentum * covariance +
    (1 - momentum) * mean(q q')`` and the mean over the images of all ranks (https://arxiv.org/abs/2206.10698).

    Args:
        query: Embeddings of the first view, ``(B, D)``; normalized here.
        key: Embeddings of the second view, ``(B, D)``; normalized here. The paper's come from an EMA network.
        covariance: The second moment of the queries before this step, ``(D, D)``, without gradient.
        covariance_momentum: Share of it that is kept, in [0, 1]; 0.9 in the paper.
        covariance_weight: Weight of the second term, >= 0; 8 in the paper.
        detach_covariance: Treat C as a constant and add 1 to the loss, as lightly does. In the paper the second moment
            of the batch has gradient, which counts twice for it.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: If shapes differ, or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("query", query, "key", key)
    check_matrix("covariance", covariance, query.shape[1])
    rule = f"be square, ({query.shape[1]}, {query.shape[1]})"
    require(len(covariance) == query.shape[1], "covariance", rule, tuple(covariance.shape), "Start with zeros")
    check_probability("covariance_momentum", covariance_momentum)
    check_not_negative("covariance_weight", covariance_weight)
    q, k = normalize(query), normalize(key)
    count = distributed.all_reduce_sum(q.new_full((), len(q)))
    moment = distributed.all_reduce_sum_with_gradient(q.T @ q) / count  # (D, D)
    moved = covariance_momentum * covariance + (1 - covariance_momentum) * moment
    if detach_covariance:
        moved = moved.detach()
    loss = global_mean(covariance_weight * ((q @ moved) * q).sum(1) - (q * k).sum(1))
    return loss + 1 if detach_covariance else loss


def draw_permutations(size: int, *, iterations: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw the ``permutations`` of `w_mse_loss` on the CPU.

    Args:
        size: Number of images of the global batch, >= 1.
        iterations: Number of permutations, >= 1.
        generator: Generator of the CPU, equal on all ranks; None is torch's global one.

    Returns:
        Integers ``(iterations, size)`` on the CPU.

    Raises:
        ValueError: If a number is below 1.
    """
    check_at_least("iterations", iterations, 1)
    return torch.stack([torch.randperm(size, generator=generator, device="cpu") for _ in range(iterations)])


@full_precision
def w_mse_loss(views: Tensor, permutations: Tensor, *, whitening_size: int, eps: float = 0.0) -> Tensor:
    """Compute W-MSE: the distance of the whitened and then normalized embeddings of each pair of views.

    The images of the global batch are divided into sub-batches, the same for all views. In each sub-batch and view the
    embeddings are centered and multiplied by the inverse of the Cholesky factor of their covariance. The loss is the
    mean of ``2 - 2 cos`` over pairs of views, images and permutations: 0 for equal views, about 2 for unrelated ones
    (https://arxiv.org/abs/2007.06346).

    Source: https://github.com/htdt/self-supervised (``w_mse.py``).
    Differs from it: the images that are left over when a permutation is divided are left out of it (the reference needs
    a batch that is a multiple of ``whitening_size``); sub-batches take the images of all ranks.

    Args:
        views: Embeddings, ``(views, B, D)`` of two or more views.
        permutations: An order of the images of all ranks per iteration, ``(iterations, B)`` integers, the same on every
            rank; see `draw_permutations`.
        whitening_size: Images of a sub-batch, more than D so that the covariance has full rank, and at most B; the
            paper has 2 D.
        eps: Share of the identity in the covariance, in [0, 1]; 0 in the paper. Above 0, fewer images are allowed.

    Returns:
        A scalar in [0, 4], the same on every rank; NaN if a covariance is not positive definite, as after a collapse.

    Raises:
        ValueError: If a shape or a number is out of range.
        TypeError: If the embeddings are not floating point, or the permutations no integers.
    """
    check_floating("views", views)
    hint = "Stack the embeddings of two or more views"
    require(views.ndim == 3 and len(views) >= 2, "views", "have the shape (views >= 2, B, D)", tuple(views.shape), hint)
    check_probability("eps", eps)
    check_whitening("whitening_size", whitening_size, views.shape[2], eps)
    rows = distributed.gather_with_gradient(views.transpose(0, 1))  # (N, V, D)
    check_batch("views", len(rows), whitening_size)
    if permutations.is_floating_point():
        fail(
            "permutations", "be an integer tensor", permutations.dtype, "Draw them with `draw_permutations`", TypeError
        )
    rule = f"have the shape (iterations, {len(rows)}), one place per image of all ranks"
    ok = permutations.ndim == 2 and permutations.shape[1] == len(rows) and len(permutations) > 0
    require(ok, "permutations", rule, tuple(permutations.shape), "Draw them with `draw_permutations`")
    used = len(rows) // whitening_size * whitening_size
    order = send(permutations[:, :used].reshape(-1, whitening_size), rows.device)  # (S, W)
    parts = rows[order].transpose(1, 2)  # (S, V, W, D)
    centered = parts - parts.mean(2, keepdim=True)
    covariance = centered.mT @ centered / (whitening_size - 1)  # (S, V, D, D)
    if eps:
        covariance = (1 - eps) * covariance + eps * torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device)
    factor, info = torch.linalg.cholesky_ex(covariance)  # reads nothing on the host, unlike `cholesky`
    factor = factor.masked_fill((info > 0)[..., None, None], torch.nan)
    white = torch.linalg.solve_triangular(factor, centered.mT, upper=False).mT  # (S, V, W, D)
    unit = F.normalize(white, dim=3)
    first, second = torch.triu_indices(len(views), len(views), 1, device="cpu").tolist()
    return (unit[:, first] - unit[:, second]).square().sum(3).mean()


def check_whitening(name: str, whitening_size: int, dim: int, eps: float) -> None:
    """Check that a sub-batch of ``whitening_size`` rows can whiten ``dim`` dimensions.

    Args:
        name: Name of the size, for the message.
        whitening_size: Rows of a sub-batch.
        dim: D, width of the embeddings.
        eps: Share of the identity in the covariance; above 0, 2 rows are enough.
    """
    hint = f"Use twice the width as the paper does ({2 * dim}), or narrower embeddings"
    check_at_least(name, whitening_size, 2 if eps > 0 else dim + 1, hint)


@full_precision
def mmcr_loss(views: Tensor, momentum_views: Tensor | None = None, *, local_weight: float = 0.0) -> Tensor:
    """Compute MMCR: the negative nuclear norm of the images' centroids, the means of their unit embeddings.

    A large norm means that the views of an image agree, which makes its centroid long, and that the centroids of
    different images span many dimensions. With N images on all ranks it is at least ``-sqrt(N min(N, D))``, and -N for
    orthonormal centroids; loss and gradient grow with N (https://arxiv.org/abs/2303.03307).

    Source: https://github.com/ThomasYerxa/mmcr (``loss_mmcr.py``, ``loss_mmcr_momentum.py``).
    Differs from it: with several ranks the mean over ranks is the gradient of one process; in the reference it is that
    divided by the number of ranks.

    Args:
        views: Embeddings, ``(B, V, D)``; normalized here.
        momentum_views: Embeddings of the views by an EMA network, ``(B, V, D)``; normalized here. Each centroid is then
            the mean of the two networks' centroids.
        local_weight: Weight of the mean nuclear norm of the V embeddings of each image, >= 0; 0 in the paper's runs.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: If a shape is another one, or the weight is negative.
        TypeError: If the embeddings are not floating point.
    """
    check_floating("views", views)
    hint = "Stack the embeddings of the views in dimension 1"
    require(views.ndim == 3 and views.shape[1] >= 1, "views", "have the shape (B, views, D)", tuple(views.shape), hint)
    check_not_negative("local_weight", local_weight)
    unit = F.normalize(views, dim=2)
    centroids = unit.mean(1)  # (B, D)
    if momentum_views is not None:
        check_same_shape("views", views, "momentum_views", momentum_views, 3)
        centroids = (centroids + F.normalize(momentum_views, dim=2).mean(1)) / 2
    loss: Tensor = -torch.linalg.svdvals(distributed.gather_with_gradient(centroids)).sum()
    if local_weight:
        loss = loss + local_weight * global_mean(torch.linalg.svdvals(unit).sum(1))
    return loss


def naive_log_det_loss(z: Tensor, *, distortion: float = 0.5) -> Tensor:
    """Reference form of `log_det_loss`: the log determinant of the ``(D, D)`` matrix.

    Args:
        z: Features of one view, ``(B, D)``.
        distortion: Squared precision of the code, > 0.
    """
    unit = F.normalize(z, dim=1)
    covariance = unit.T @ unit / len(z)  # (D, D)
    identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return -0.5 * torch.logdet(identity + z.shape[1] / distortion * covariance)


@full_precision
def log_det_loss(z: Tensor, *, distortion: float = 0.5) -> Tensor:
    """Compute the negative coding rate of unit features: it is lowest if all directions are used alike.

    Implements ``-R(Z, eps)`` of MCR2 (https://arxiv.org/abs/2006.08558), ``-0.5 logdet(I + D / (B eps^2) Z'Z)``, over
    the global batch. Inputs are L2-normalized here. The determinant of the smaller of Z'Z and ZZ' is computed.

    Args:
        z: Features of one view, ``(B, D)``.
        distortion: ``eps^2``, the squared precision of the code, > 0; 0.5 in the paper.

    Returns:
        A scalar in nats, the same on every rank, between ``-0.5 K log(1 + D / (K distortion))`` for K = min(B, D) and
        ``-0.5 log(1 + D / distortion)``, the value of equal features.

    Raises:
        ValueError: If the shape is wrong, the batch is smaller than 2, or ``distortion`` is not positive.
        TypeError: If the features are not floating point.
    """
    check_matrix("z", z)
    check_positive("distortion", distortion, "The paper uses 0.5")
    rows = _gathered("z", normalize(z))
    size, width = rows.shape
    gram = rows @ rows.T if size < width else rows.T @ rows
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor: Tensor = torch.linalg.cholesky_ex(gram * (width / (size * distortion)) + one).L  # without a host read
    return -factor.diagonal().log().sum()
