"""Softmax losses over all negatives of the global batch: NT-Xent, InfoNCE, SupCon.

Each returns the loss of the concatenated batch of all ranks, the same on every rank; the mean over ranks of its
gradients, which DDP and FSDP take, is the gradient of one process. None of them materializes the similarity matrix
(see `lightning_contrast.losses.kernels`). The ``naive_*`` functions do: they are the formulas, for one process, and
the tests compare the losses with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_positive
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import (
    Scalar,
    check_extra_negatives,
    check_floating,
    check_groups,
    check_labels,
    check_negatives,
    check_pair,
    check_query_groups,
    check_tile_size,
    inverse_temperature,
)
from lightning_contrast.losses.kernels.logsumexp import NegativeMask, rows_lse, self_lse
from lightning_contrast.losses.kernels.normalization import normalize_rows
from lightning_contrast.losses.negatives import (
    AnchorBatch,
    Negatives,
    anchor_losses,
    as_negatives,
    losses_from_all,
    losses_from_negatives,
)
from lightning_contrast.precision import full_precision


def naive_nt_xent(z_a: Tensor, z_b: Tensor, *, temperature: Scalar) -> Tensor:
    """Reference form of `nt_xent`: materializes the ``(2N, 2N)`` similarity matrix.

    Args:
        z_a: Embeddings of the first view, ``(N, D)``.
        z_b: Embeddings of the second view, ``(N, D)``.
        temperature: Divisor of the cosine similarities, > 0.
    """
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)  # (2N, D)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)  # (2N, 2N)
    positive = torch.arange(len(z), device=z.device).roll(len(z_a))  # the other view of the same image
    return F.cross_entropy(logits, positive)


@full_precision
def nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    *,
    temperature: Scalar,
    weighting: Negatives | str = "uniform",
    groups: Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Compute the normalized temperature-scaled cross entropy of two views (NT-Xent).

    Implements Eq. 1 of SimCLR (https://arxiv.org/abs/2002.05709): the positive of each of the 2N embeddings is the
    other view of its image, the negatives are all remaining embeddings of the global batch. Inputs are L2-normalized
    here.
    Differs from the reference implementation (TensorFlow), which returns the sum of the means of the two halves, twice
    this value.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        temperature: Divisor of the cosine similarities; unitless, > 0; a number, or a learned tensor with one element.
        weighting: How the negatives are weighted, a `Negatives` or the name of one with its default values.
        groups: Group of each image, ``(B,)`` integers: images of the same group, such as known duplicates or samples
            of the same class, are not negatives of each other; None: every other image is a negative.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the 2N anchors of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("z_a", z_a, "z_b", z_b)
    check_tile_size(tile_size)
    check_groups(groups, len(z_a))
    scale, weighting = inverse_temperature(temperature), as_negatives(weighting)
    z = normalize_rows(torch.cat([z_a, z_b]))  # (2B, D)
    first, second = z.view(2, *z_a.shape).unbind()
    positive = (first * second).sum(1)  # (B,), the same for both views
    if weighting.is_uniform and groups is None:
        lse = self_lse(z, scale, NegativeMask(tile_size=tile_size, views=2)).view(2, len(z_a))
        return global_mean(losses_from_all(lse, positive * scale).flatten())
    groups = None if groups is None else groups.repeat(2)
    mask = NegativeMask(skip_partner=True, groups=groups, tile_size=tile_size, views=2)
    return global_mean(anchor_losses(AnchorBatch(z, z, positive.repeat(2), scale, mask, views=True), weighting))


def naive_info_nce(query: Tensor, key: Tensor, negatives: Tensor | None = None, *, temperature: Scalar) -> Tensor:
    """Reference form of `info_nce`: materializes the ``(B, B)`` or ``(B, 1 + K)`` similarity matrix.

    Args:
        query: Embeddings, ``(B, D)``.
        key: The positive of each query, ``(B, D)``.
        negatives: Negatives that all queries share, ``(K, D)``; None: the other keys.
        temperature: Divisor of the cosine similarities, > 0.
    """
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    if negatives is None:
        return F.cross_entropy(query @ key.T / temperature, torch.arange(len(query), device=query.device))
    positive = (query * key).sum(1, keepdim=True)  # (B, 1)
    similarities = torch.cat([positive, query @ F.normalize(negatives, dim=1).T], dim=1)  # (B, 1 + K)
    return F.cross_entropy(similarities / temperature, query.new_zeros(len(query), dtype=torch.long))


@full_precision
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Scalar,
    negatives_mask: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    weighting: Negatives | str = "uniform",
    groups: Tensor | None = None,
    negatives_groups: Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Compute the InfoNCE loss of queries with one positive each and shared negatives.

    Implements Eq. 1 of MoCo (https://arxiv.org/abs/1911.05722) with a queue as ``negatives``, and the in-batch form of
    CPC (https://arxiv.org/abs/1807.03748) without. Inputs are L2-normalized here. Keys and negatives receive gradient
    if they require it; those of MoCo do not.

    Args:
        query: Embeddings, ``(B, D)``.
        key: The positive of each query, ``(B, D)``.
        negatives: Negatives that all queries share, ``(K, D)``, the same on every rank; None: the other keys of the
            global batch.
        temperature: Divisor of the cosine similarities; unitless, > 0; a number, or a learned tensor with one element.
        negatives_mask: Which negatives count, ``(K,)`` bool; False for rows of a queue that are not filled yet.
        extra_negatives: Additional negatives of each query, ``(B, S, D)``, for example from `mochi_negatives`; only
            with ``weighting="uniform"``.
        weighting: How the negatives are weighted, a `Negatives` or the name of one with its default values.
        groups: Group of each query, ``(B,)`` integers: images of the same group, such as known duplicates or samples
            of the same class, are not negatives of each other; None: no negative is masked.
        negatives_groups: Group of each negative, ``(K,)``; required if ``negatives`` and ``groups`` are given.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the queries of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not match, the batch is smaller than 2 (1 with ``negatives``), or a number is out of
            range.
        TypeError: If the embeddings are not floating point, or the mask is not bool.
    """
    check_pair("query", query, "key", key, minimum=2 if negatives is None else 1)
    check_tile_size(tile_size)
    scale = inverse_temperature(temperature)
    check_negatives(negatives, negatives_mask, query.shape[1])
    check_query_groups(groups, negatives_groups, len(query), negatives)
    weighting = as_negatives(weighting)
    query, key = normalize_rows(query), normalize_rows(key)
    positive = (query * key).sum(1)  # (B,)
    if negatives is None and extra_negatives is None and weighting.is_uniform and groups is None:
        lse = rows_lse(query, key, scale, NegativeMask(tile_size=tile_size))
        return global_mean(losses_from_all(lse, positive * scale))
    columns = key if negatives is None else normalize_rows(negatives.to(query.dtype))
    mask = NegativeMask(negatives is None, groups, negatives_groups, negatives_mask, tile_size)
    anchors = AnchorBatch(query, columns, positive, scale, mask, sharded=negatives is None)
    if extra_negatives is None:
        return global_mean(anchor_losses(anchors, weighting))
    check_extra_negatives(extra_negatives, query, weighting.kind)
    extra = normalize_rows(extra_negatives.to(query.dtype).flatten(0, 1)).view_as(extra_negatives)
    own = (extra @ query.unsqueeze(2)).squeeze(2) * scale  # (B, S)
    return global_mean(losses_from_negatives(torch.logaddexp(anchors.lse(scale), own.logsumexp(1)), positive * scale))


def naive_sup_con(z_a: Tensor, z_b: Tensor, labels: Tensor, *, temperature: Scalar) -> Tensor:
    """Reference form of `sup_con`: materializes the ``(2N, 2N)`` similarity matrix.

    Args:
        z_a: Embeddings of the first view, ``(N, D)``.
        z_b: Embeddings of the second view, ``(N, D)``.
        labels: Class of each image, ``(N,)`` integers.
        temperature: Divisor of the cosine similarities, > 0.
    """
    z, labels = F.normalize(torch.cat([z_a, z_b]), dim=1), labels.repeat(2)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_probabilities = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)  # (2N, 2N)
    positives = (labels[:, None] == labels) & ~itself
    return -(log_probabilities.masked_fill(~positives, 0).sum(1) / positives.sum(1)).mean()


@full_precision
def sup_con(
    z_a: Tensor,
    z_b: Tensor,
    labels: Tensor,
    *,
    temperature: Scalar,
    base_temperature: float | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Compute the supervised contrastive loss, whose positives are all embeddings of the same class.

    Implements Eq. 2, "L_out", of SupCon (https://arxiv.org/abs/2004.11362) times ``temperature / base_temperature`` as
    the reference implementation does. Inputs are L2-normalized here.
    Differs from it: its ``base_temperature`` is 0.07, here the default is ``temperature``.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        labels: Class of each image, ``(B,)`` integers of any value.
        temperature: Divisor of the cosine similarities; unitless, > 0; a number, or a learned tensor with one element.
        base_temperature: The loss is multiplied by ``temperature / base_temperature``; > 0; None: by 1.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the 2N anchors of all ranks, a scalar.

    Raises:
        ValueError: If shapes do not match, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point, or the labels not integers.
    """
    check_pair("z_a", z_a, "z_b", z_b)
    check_tile_size(tile_size)
    check_labels(labels, len(z_a))
    scale = inverse_temperature(temperature)
    if base_temperature is not None:
        check_positive("base_temperature", base_temperature)
    factor = 1.0 if base_temperature is None else 1.0 / (scale * base_temperature)
    z = normalize_rows(torch.cat([z_a, z_b]))  # (2B, D)
    sums, counts = class_sums(z, labels.repeat(2))  # (2B, D), (2B,)
    positive = ((z * sums).sum(1) - (z * z).sum(1)) / (counts - 1)  # an anchor is not its own positive
    lse = self_lse(z, scale, NegativeMask(tile_size=tile_size, views=2))
    return global_mean(losses_from_all(lse, positive * scale)) * factor


def class_sums(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count, for each row of this rank, the rows of all ranks with the same label.

    Args:
        z: Embeddings, ``(N, D)``.
        labels: ``(N,)`` integers of any value.

    Returns:
        Sums ``(N, D)`` with gradient, and counts ``(N,)``.
    """
    check_floating("z", z)
    all_rows, all_labels = distributed.gather_with_gradient(z), distributed.gather(labels)
    # Positions in the sorted labels number the classes; `unique` would give shapes that depend on the data.
    ordered = all_labels.sort().values
    all_slots, own_slots = (torch.searchsorted(ordered, wanted) for wanted in (all_labels, labels))
    sums = torch.zeros_like(all_rows).index_add(0, all_slots, all_rows)
    counts = torch.zeros_like(all_rows[:, 0]).index_add(0, all_slots, torch.ones_like(all_rows[:, 0]))
    return sums[own_slots], counts[own_slots]


def debiased_nt_xent(
    z_a: Tensor, z_b: Tensor, *, temperature: Scalar, tau_plus: float, tile_size: int | None = None
) -> Tensor:
    """Compute NT-Xent with an estimate of the false negatives subtracted from the normalizer.

    Implements Eq. 8 of debiased contrastive learning (https://arxiv.org/abs/2007.00224) as the reference
    implementation does. Inputs are L2-normalized here.
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
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    weighting = Negatives("debiased", tau_plus=tau_plus)
    return nt_xent(z_a, z_b, temperature=temperature, weighting=weighting, tile_size=tile_size)


def hard_negative_nt_xent(
    z_a: Tensor, z_b: Tensor, *, temperature: Scalar, tau_plus: float, beta: float, tile_size: int | None = None
) -> Tensor:
    """Compute the debiased NT-Xent with larger weights for negatives that are similar to the anchor.

    Implements Eq. 4 of hard negative sampling (https://arxiv.org/abs/2010.04592) as the reference implementation does,
    with gradient through the importance weights. Inputs are L2-normalized here.

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
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    weighting = Negatives("hard", tau_plus=tau_plus, beta=beta)
    return nt_xent(z_a, z_b, temperature=temperature, weighting=weighting, tile_size=tile_size)


def decoupled_nt_xent(
    z_a: Tensor, z_b: Tensor, *, temperature: Scalar, sigma: float | None = None, tile_size: int | None = None
) -> Tensor:
    """Compute NT-Xent without the positive in the denominator.

    Implements Eq. 5 and 6 of decoupled contrastive learning (https://arxiv.org/abs/2110.06848), the mean of both
    directions. Inputs are L2-normalized here.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        temperature: Divisor of the cosine similarities; unitless, > 0; 0.1 in the paper.
        sigma: Width of the weighting of positives (DCLW), > 0, 0.5 in the paper; None: no weighting (DCL).
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the 2N anchors of all ranks, a scalar in nats, which may be negative.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    weighting = Negatives("decoupled") if sigma is None else Negatives("decoupled_weighted", sigma=sigma)
    return nt_xent(z_a, z_b, temperature=temperature, weighting=weighting, tile_size=tile_size)
