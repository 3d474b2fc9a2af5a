"""SimCLR's flow with other normalisers, each under its paper's name: debiased, hard-negative, decoupled."""

from torch import Tensor

from lightning_contrast.losses._prepare import Scalar
from lightning_contrast.losses.contrastive import nt_xent
from lightning_contrast.losses.negatives import Negatives


def debiased_nt_xent(
    z_a: Tensor, z_b: Tensor, *, temperature: Scalar, tau_plus: float, tile_size: int | None = None
) -> Tensor:
    """Return NT-Xent with the false negatives taken off the normaliser.

    Implements Eq. 8 of debiased contrastive learning (https://arxiv.org/abs/2007.00224) as in the authors' program.
    Inputs are L2-normalised here.
    Differs from it: the number of negatives is that of the global batch, not of one replica.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        temperature: Divisor of the cosine similarities; unitless, > 0; 0.5 in the paper.
        tau_plus: Share of the negatives that are of the anchor's class, in [0, 1); 0 gives `nt_xent`.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the 2N anchors of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of its range.
        TypeError: If the embeddings are not floating point.
    """
    handling = Negatives("debiased", tau_plus=tau_plus)
    return nt_xent(z_a, z_b, temperature=temperature, handling=handling, tile_size=tile_size)


def hard_negative_nt_xent(
    z_a: Tensor, z_b: Tensor, *, temperature: Scalar, tau_plus: float, beta: float, tile_size: int | None = None
) -> Tensor:
    """Return the debiased NT-Xent with more weight on negatives that are similar to the anchor.

    Implements Eq. 4 of hard negative sampling (https://arxiv.org/abs/2010.04592) as in the authors' program, with
    gradient through the importance weights. Inputs are L2-normalised here.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        temperature: Divisor of the cosine similarities; unitless, > 0; 0.5 in the paper.
        tau_plus: Share of the negatives that are of the anchor's class, in [0, 1).
        beta: Concentration on hard negatives, >= 0; 0 gives `debiased_nt_xent`.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the 2N anchors of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of its range.
        TypeError: If the embeddings are not floating point.
    """
    handling = Negatives("hard", tau_plus=tau_plus, beta=beta)
    return nt_xent(z_a, z_b, temperature=temperature, handling=handling, tile_size=tile_size)


def decoupled_nt_xent(
    z_a: Tensor, z_b: Tensor, *, temperature: Scalar, sigma: float | None = None, tile_size: int | None = None
) -> Tensor:
    """Return NT-Xent without the positive in the denominator.

    Implements Eq. 5 and 6 of decoupled contrastive learning (https://arxiv.org/abs/2110.06848), the mean of both
    directions. Inputs are L2-normalised here.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        temperature: Divisor of the cosine similarities; unitless, > 0; 0.1 in the paper.
        sigma: Width of the weighting of positives (DCLW), > 0, 0.5 in the paper; None: no weighting (DCL).
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the 2N anchors of all ranks, a scalar in nats, which may be negative.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of its range.
        TypeError: If the embeddings are not floating point.
    """
    handling = Negatives("decoupled") if sigma is None else Negatives("decoupled_weighted", sigma=sigma)
    return nt_xent(z_a, z_b, temperature=temperature, handling=handling, tile_size=tile_size)
