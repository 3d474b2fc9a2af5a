"""Losses of methods with a momentum encoder or a stop-gradient: BYOL, SimSiam, MoCo v3."""

import torch
from torch import Tensor

from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import Scalar, check_pair
from lightning_contrast.losses.contrastive import info_nce
from lightning_contrast.precision import full_precision, normalize


@full_precision
def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the negative cosine similarity of predictions and targets.

    Implements Eq. 1 of SimSiam (https://arxiv.org/abs/2011.10566), one direction; SimSiam averages both. The target
    receives no gradient.

    Args:
        prediction: Output of the predictor, ``(B, D)``.
        target: Projection of the other view, ``(B, D)``.

    Returns:
        The mean over the images of all ranks, a scalar in [-1, 1].

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the inputs are not floating point.
    """
    check_pair("prediction", prediction, "target", target, minimum=1)
    return -global_mean((normalize(prediction) * normalize(target.detach())).sum(1))


@full_precision
def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the squared distance of predictions and targets on the unit sphere, ``2 - 2 cos``.

    Implements Eq. 2 of BYOL (https://arxiv.org/abs/2006.07733), one direction; BYOL adds both. The target receives no
    gradient.

    Args:
        prediction: Output of the online network's predictor, ``(B, D)``.
        target: Projection of the target network, ``(B, D)``.

    Returns:
        The mean over the images of all ranks, a scalar in [0, 4].

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the inputs are not floating point.
    """
    check_pair("prediction", prediction, "target", target, minimum=1)
    # 2 - 2 cos would cancel to the rounding of 2 for similar rows, and could be negative.
    return global_mean((normalize(prediction) - normalize(target.detach())).square().sum(1))


@full_precision
def moco_v3_loss(
    q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, *, temperature: Scalar, tile_size: int | None = None
) -> Tensor:
    """Compute the symmetric contrastive loss of MoCo v3.

    Implements Algorithm 1 of MoCo v3 (https://arxiv.org/abs/2104.02057): the negatives of a query are the other
    keys of the other view over the global batch, and each direction is multiplied by twice the temperature. Keys
    receive no gradient. Inputs are L2-normalized here.

    Args:
        q1: Predictions of the first view, ``(B, D)``.
        q2: Predictions of the second view, ``(B, D)``.
        k1: Keys of the first view, ``(B, D)``.
        k2: Keys of the second view, ``(B, D)``.
        temperature: Divisor of the cosine similarities; unitless, > 0; 1.0 for ResNets and 0.2 for ViTs in the paper.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The sum of both directions, each a mean over the queries of all ranks, a scalar.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of range.
        TypeError: If the inputs are not floating point.
    """
    check_pair("q1", q1, "k2", k2)
    check_pair("q2", q2, "k1", k1)
    first = info_nce(q1, k2.detach(), temperature=temperature, tile_size=tile_size)
    second = info_nce(q2, k1.detach(), temperature=temperature, tile_size=tile_size)
    factor = 2 * (temperature.reshape(()) if isinstance(temperature, Tensor) else temperature)
    return torch.as_tensor(factor * (first + second))
