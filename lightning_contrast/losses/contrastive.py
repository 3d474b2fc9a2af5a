"""Softmax losses over all negatives of the global batch: NT-Xent, InfoNCE, SupCon.

None of them forms the similarity matrix: see `lightning_contrast.losses.kernels.tiles`. Each returns the loss of the
joined batch of all ranks, the same on every rank, with a gradient whose mean over ranks is that of one process.
"""

import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_positive, fail
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import (
    Scalar,
    check_floating,
    check_matrix,
    check_pair,
    check_tile_size,
    inverse_temperature,
)
from lightning_contrast.losses.kernels.logsumexp import NegativeMask, rows_lse, self_lse
from lightning_contrast.losses.negatives import AnchorBatch, Negatives, anchor_losses, as_negatives
from lightning_contrast.precision import full_precision, normalize


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
    """Return the normalised temperature-scaled cross entropy of two views.

    Implements Eq. 1 of SimCLR (https://arxiv.org/abs/2002.05709): each of the 2N embeddings has the other view of its
    image as positive, and all remaining embeddings of the global batch as negatives. Inputs are L2-normalised here.
    Differs from it: the authors' TensorFlow program returns twice this value, the sum of the means of two halves.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        temperature: Divisor of the cosine similarities; unitless, > 0; a number, or a learned tensor of one element.
        weighting: How the negatives count, a `Negatives` or the name of one with its default numbers.
        groups: Group of each image, ``(B,)`` integers: images of one group, such as known duplicates or samples of one
            class, are not negatives of each other; None: all other images are.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the 2N anchors of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of its range.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("z_a", z_a, "z_b", z_b)
    check_tile_size(tile_size)
    check_groups(groups, len(z_a))
    scale, weighting = inverse_temperature(temperature), as_negatives(weighting)
    z = normalize(torch.cat([z_a, z_b]))  # (2B, D)
    positive = (z[: len(z_a)] * z[len(z_a) :]).sum(1).repeat(2)  # (2B,)
    if weighting.is_uniform and groups is None:
        return global_mean(self_lse(z, scale, NegativeMask(tile_size=tile_size, views=2)) - positive * scale)
    columns = NegativeMask(
        skip_partner=True, groups=None if groups is None else groups.repeat(2), tile_size=tile_size, views=2
    )
    return global_mean(anchor_losses(AnchorBatch(z, z, positive, scale, columns, views=True), weighting))


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
    """Return the InfoNCE loss: each query has one positive, and negatives that all queries share.

    Implements Eq. 1 of MoCo (https://arxiv.org/abs/1911.05722) with a queue as ``negatives``, and the in-batch form of
    CPC (https://arxiv.org/abs/1807.03748) without. Inputs are L2-normalised here. Keys and negatives receive gradient
    where they ask for it; MoCo's do not.

    Args:
        query: Embeddings, ``(B, D)``.
        key: The positive of each query, ``(B, D)``.
        negatives: Negatives that all queries share, ``(K, D)``, the same on every rank; None: the other keys of the
            global batch.
        temperature: Divisor of the cosine similarities; unitless, > 0; a number, or a learned tensor of one element.
        negatives_mask: Which negatives count, ``(K,)`` bool; False marks a row that is not filled yet.
        extra_negatives: Further negatives of each query of its own, ``(B, S, D)``, such as `mochi_negatives` makes;
            only with ``weighting="uniform"``.
        weighting: How the negatives count, a `Negatives` or the name of one with its default numbers.
        groups: Group of each query, ``(B,)`` integers: images of one group, such as known duplicates or samples of one
            class, are not negatives of each other; None: none are left out.
        negatives_groups: Group of each negative, ``(K,)``, where ``negatives`` and ``groups`` are given.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the queries of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not fit, the batch is smaller than 2 (1 with ``negatives``), or a number is out of its
            range.
        TypeError: If the embeddings are not floating point, or the mask is not bool.
    """
    check_pair("query", query, "key", key, minimum=2 if negatives is None else 1)
    check_tile_size(tile_size)
    scale = inverse_temperature(temperature)
    check_negatives(negatives, negatives_mask, query.shape[1])
    check_query_groups(groups, negatives_groups, len(query), negatives)
    weighting = as_negatives(weighting)
    query, key = normalize(query), normalize(key)
    positive = (query * key).sum(1)  # (B,)
    if negatives is None and extra_negatives is None and weighting.is_uniform and groups is None:
        return global_mean(rows_lse(query, key, scale, NegativeMask(tile_size=tile_size)) - positive * scale)
    bank = key if negatives is None else normalize(negatives.to(query.dtype))
    columns = NegativeMask(negatives is None, groups, negatives_groups, negatives_mask, tile_size)
    field = AnchorBatch(query, bank, positive, scale, columns, together=negatives is None)
    if extra_negatives is None:
        return global_mean(anchor_losses(field, weighting))
    check_extra(extra_negatives, query, weighting)
    extra = normalize(extra_negatives.to(query.dtype).flatten(0, 1)).view_as(extra_negatives)
    own = (extra @ query.unsqueeze(2)).squeeze(2) * scale  # (B, S)
    others = torch.logaddexp(field.lse(scale), own.logsumexp(1))
    return global_mean(torch.logaddexp(positive * scale, others) - positive * scale)


def check_negatives(negatives: Tensor | None, mask: Tensor | None, dim: int) -> None:
    """Check shared negatives ``(K, dim)`` and their mask ``(K,)``."""
    if negatives is None:
        if mask is not None:
            fail("negatives_mask", "come with `negatives`", "negatives=None", "Give both, or none")
        return
    check_matrix("negatives", negatives, dim)
    if mask is None:
        return
    if mask.dtype != torch.bool:
        fail("negatives_mask", "be a bool tensor", mask.dtype, "Give True for each row that counts", TypeError)
    if mask.shape != negatives.shape[:1]:
        fail("negatives_mask", f"have shape ({len(negatives)},)", tuple(mask.shape), "Give one value for each negative")


def check_groups(groups: Tensor | None, size: int) -> None:
    """Check integer groups ``(size,)`` where they are given."""
    if groups is not None:
        check_labels(groups, size, "groups")


def check_query_groups(groups: Tensor | None, others: Tensor | None, size: int, negatives: Tensor | None) -> None:
    """Check that queries and negatives both have groups, or neither has."""
    check_groups(groups, size)
    if (others is not None) != (groups is not None and negatives is not None):
        given = "given" if others is not None else "None"
        hint = "Give both groups where there are `negatives`, and `groups` alone where the other keys are the negatives"
        fail("negatives_groups", "come with `groups` and `negatives`", given, hint)
    if others is not None and negatives is not None:
        check_labels(others, len(negatives), "negatives_groups")


def check_extra(extra: Tensor, query: Tensor, weighting: Negatives) -> None:
    """Check negatives of each query, ``(B, S, D)``."""
    check_floating("extra_negatives", extra)
    if extra.ndim != 3 or extra.shape[0] != len(query) or extra.shape[2] != query.shape[1]:
        rule = f"have shape ({len(query)}, S, {query.shape[1]})"
        fail("extra_negatives", rule, tuple(extra.shape), "Give S negatives for each query")
    if not weighting.is_uniform:
        fail("weighting", "be 'uniform' with `extra_negatives`", weighting.kind, "Leave one of them out")


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
    """Return the supervised contrastive loss: all embeddings of the same class are positives.

    Implements Eq. 2, "L_out", of SupCon (https://arxiv.org/abs/2004.11362) times ``temperature / base_temperature`` as
    in the authors' program. Inputs are L2-normalised here.
    Differs from it: the program's ``base_temperature`` is 0.07, here it is ``temperature`` unless given.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        labels: Class of each image, ``(B,)`` integers of any value.
        temperature: Divisor of the cosine similarities; unitless, > 0; a number, or a learned tensor of one element.
        base_temperature: The loss is multiplied by ``temperature / base_temperature``; > 0; None: by 1.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the 2N anchors of all ranks, a scalar.

    Raises:
        ValueError: If shapes do not fit, the batch is smaller than 2, or a number is out of its range.
        TypeError: If the embeddings are not floating point, or the labels not integers.
    """
    check_pair("z_a", z_a, "z_b", z_b)
    check_tile_size(tile_size)
    check_labels(labels, len(z_a))
    scale = inverse_temperature(temperature)
    if base_temperature is not None:
        check_positive("base_temperature", base_temperature)
    factor = 1.0 if base_temperature is None else 1.0 / (scale * base_temperature)
    z = normalize(torch.cat([z_a, z_b]))  # (2B, D)
    sums, counts = class_sums(z, labels.repeat(2))  # (2B, D), (2B,)
    positive = ((z * sums).sum(1) - (z * z).sum(1)) / (counts - 1) * scale  # an anchor is not its own positive
    return global_mean(self_lse(z, scale, NegativeMask(tile_size=tile_size, views=2)) - positive) * factor


def check_labels(labels: Tensor, size: int, name: str = "labels") -> None:
    """Check integer labels ``(size,)``."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        fail(name, "be an integer tensor", found, "Give class numbers", TypeError)
    if labels.shape != (size,):
        fail(name, f"have shape ({size},)", tuple(labels.shape), "Give one class number for each image")


def class_sums(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row of this rank the sum and the number of the rows of all ranks with the same label.

    Args:
        z: Embeddings, ``(N, D)``.
        labels: ``(N,)`` integers of any value.

    Returns:
        Sums ``(N, D)`` with gradient, and counts ``(N,)``.
    """
    check_floating("z", z)
    everyone, all_labels = distributed.gather_with_gradient(z), distributed.gather(labels)
    # Ranks of the sorted labels number the classes without a shape that depends on the data, as `unique` would have.
    ordered = all_labels.sort().values
    slot_of_all, slot_of_own = (torch.searchsorted(ordered, wanted) for wanted in (all_labels, labels))
    sums = torch.zeros_like(everyone).index_add(0, slot_of_all, everyone)
    counts = torch.zeros_like(everyone[:, 0]).index_add(0, slot_of_all, torch.ones_like(everyone[:, 0]))
    return sums[slot_of_own], counts[slot_of_own]


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
    weighting = Negatives("debiased", tau_plus=tau_plus)
    return nt_xent(z_a, z_b, temperature=temperature, weighting=weighting, tile_size=tile_size)


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
    weighting = Negatives("hard", tau_plus=tau_plus, beta=beta)
    return nt_xent(z_a, z_b, temperature=temperature, weighting=weighting, tile_size=tile_size)


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
    weighting = Negatives("decoupled") if sigma is None else Negatives("decoupled_weighted", sigma=sigma)
    return nt_xent(z_a, z_b, temperature=temperature, weighting=weighting, tile_size=tile_size)
