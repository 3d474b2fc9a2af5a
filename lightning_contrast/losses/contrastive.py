"""Softmax losses over all negatives of the global batch: NT-Xent, InfoNCE, SupCon.

Each returns the loss of the concatenated batch of all ranks, the same on every rank; the mean over ranks of its
gradients, which DDP and FSDP take, is the gradient of one process. None of them materializes the similarity matrix
(see `lightning_contrast.losses.kernels`). The ``naive_*`` functions do: they are the formulas, for one process, and
the tests compare the losses with them.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_positive, fail
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import (
    Scalar,
    check_extra_negatives,
    check_groups,
    check_labels,
    check_negatives,
    check_pair,
    check_query_groups,
    check_tile_size,
    inverse_temperature,
)
from lightning_contrast.losses.kernels.logsumexp import NegativeMask, self_lse
from lightning_contrast.losses.kernels.normalization import normalize_rows
from lightning_contrast.losses.labels import class_sums, separate_unknown
from lightning_contrast.losses.negatives import (
    AnchorBatch,
    Negatives,
    anchor_losses,
    as_negatives,
    logit_differences,
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
            of the same class, are not negatives of each other; below 0: in no group; None: every other image is a
            negative.
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
        mask = NegativeMask(skip_partner=True, tile_size=tile_size, views=2)
        lse = self_lse(z, scale, mask).view(2, len(z_a))
        return global_mean(losses_from_negatives(lse, positive, scale).flatten())
    groups = None if groups is None else separate_unknown(groups).repeat(2)
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
    negatives_sharded: bool = False,
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
            of the same class, are not negatives of each other; below 0: in no group; None: no negative is masked.
        negatives_groups: Group of each negative, ``(K,)``; required if ``negatives`` and ``groups`` are given.
        negatives_sharded: The negatives are those of all ranks, and ``negatives``, their mask and groups the share of
            this rank, as of a sharded `nn.FeatureQueue`. They get no gradient, and stay on their rank unless the
            weighting is "top_k" or "heated", which gather them.
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
    groups, weighting = None if groups is None else separate_unknown(groups), as_negatives(weighting)
    query, key = normalize_rows(query), normalize_rows(key)
    positive = (query * key).sum(1)  # (B,)
    stays = negatives is not None and negatives_sharded and distributed.is_distributed()
    if stays and weighting.kind in ("top_k", "heated"):  # need all similarities of an anchor at once
        shared = (negatives, negatives_mask, negatives_groups)
        negatives, negatives_mask, negatives_groups = (x if x is None else distributed.gather(x) for x in shared)
        stays = False
    columns = key if negatives is None else normalize_rows((negatives.detach() if stays else negatives).to(query.dtype))
    mask = NegativeMask(negatives is None, groups, negatives_groups, negatives_mask, tile_size)
    anchors = AnchorBatch(query, columns, positive, scale, mask, sharded=negatives is None or stays, stays=stays)
    if extra_negatives is None:
        return global_mean(anchor_losses(anchors, weighting))
    check_extra_negatives(extra_negatives, query, weighting.kind)
    extra = normalize_rows(extra_negatives.to(query.dtype).flatten(0, 1)).view_as(extra_negatives)
    own = (extra @ query.unsqueeze(2)).squeeze(2) * scale  # (B, S)
    lse = torch.logaddexp(anchors.lse(scale), own.logsumexp(1))  # (B,)
    return global_mean(losses_from_negatives(lse, positive, scale))


def naive_sup_con(z_a: Tensor, z_b: Tensor, labels: Tensor, *, temperature: Scalar) -> Tensor:
    """Reference form of `sup_con`: materializes the ``(2N, 2N)`` similarity matrix.

    Args:
        z_a: Embeddings of the first view, ``(N, D)``.
        z_b: Embeddings of the second view, ``(N, D)``.
        labels: Class of each image, ``(N,)`` integers >= 0.
        temperature: Divisor of the cosine similarities, > 0.
    """
    z, labels = F.normalize(torch.cat([z_a, z_b]), dim=1), labels.repeat(2)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_probabilities = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)  # (2N, 2N)
    positives = (labels[:, None] == labels) & ~itself
    return -(log_probabilities.masked_fill(~positives, 0).sum(1) / positives.sum(1)).mean()


@full_precision
def sup_con(
    *embeddings: Tensor,
    labels: Tensor | None = None,
    temperature: Scalar,
    base_temperature: float | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Compute the supervised contrastive loss, whose positives are all embeddings of the same class.

    Implements Eq. 2, "L_out", of SupCon (https://arxiv.org/abs/2004.11362) times ``temperature / base_temperature`` as
    the reference implementation does, for any number of views. Inputs are L2-normalized here.
    Differs from it: its ``base_temperature`` is 0.07, here the default is ``temperature``.

    Args:
        *embeddings: One tensor ``(B, D)`` per view, or all views in one tensor ``(B, V, D)``; then the labels, unless
            they are given by name: ``sup_con(z_a, z_b, labels, temperature=0.1)``.
        labels: Class of each image, ``(B,)`` integers; an image with a label below 0 is a class of its own.
        temperature: Divisor of the cosine similarities; unitless, > 0; a number, or a learned tensor with one element.
        base_temperature: The loss is multiplied by ``temperature / base_temperature``; > 0; None: by 1.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the V * B anchors of all ranks, a scalar; an anchor without a positive, which only one view
        allows, counts as 0.

    Raises:
        ValueError: If shapes do not match, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point, or the labels not integers.
    """
    views, labels = _views_and_labels(embeddings, labels)
    check_tile_size(tile_size)
    scale = inverse_temperature(temperature)
    if base_temperature is not None:
        check_positive("base_temperature", base_temperature)
    z = normalize_rows(torch.cat(views))  # (V B, D)
    loss = global_mean(_sup_con_losses(z, separate_unknown(labels), scale, len(views), tile_size))
    return loss if base_temperature is None else loss / (scale * base_temperature)


def _sup_con_losses(z: Tensor, labels: Tensor, scale: Scalar, count: int, tile_size: int | None) -> Tensor:
    """Compute the mean SupCon loss of the ``count`` embeddings of each image.

    A loss is small only if an anchor has a single positive, which then must not be part of the log-sum-exp, as in
    `losses_from_negatives`. With three views every anchor has two positives, and its loss is at least log 2.

    Args:
        z: Unit rows, ``(V B, D)``, view by view.
        labels: Class of each image, ``(B,)``.
        scale: 1 / temperature.
        count: Number of views V.
        tile_size: Largest edge of a tile.

    Returns:
        ``(B,)`` in nats.
    """
    views = z.view(count, -1, z.shape[1])  # (V, B, D)
    image = views.sum(0)  # (B, D)
    sums, images = class_sums(image, labels)  # (B, D), (B,)
    others = images - 1  # other images of the class
    similar = (image * (sums - image)).sum(1)  # (B,): of all V views to all views of those, exactly 0 without any
    mask = NegativeMask(tile_size=tile_size, views=count)
    if count == 2:
        partner = (views[0] * views[1]).sum(1)  # (B,)
        lse = self_lse(z, scale, replace(mask, skip_partner=True)).view(2, -1)  # (2, B)
        losses = losses_from_negatives(lse, partner, scale).mean(0)
        # The partner's similarity minus the mean over all positives, exactly 0 if the partner is the only one.
        pairs = 4 * others
        excess = (pairs * partner - similar) / (pairs + 2)
        return logit_differences(losses, excess, -scale)
    if count == 1:
        pair, positive = others == 1, similar / others.clamp_min(1)
        lse = self_lse(z, scale, replace(mask, groups=separate_unknown(labels.masked_fill(~pair, -1))))
        several = logit_differences(lse, positive, scale).masked_fill(others == 0, 0.0)
        return torch.where(pair, losses_from_negatives(lse, positive, scale), several)
    own = image.square().sum(1) - views.square().sum((0, 2))  # (B,): of the views of an image to each other
    positive = (similar + own) / (count * (count * images - 1))
    return logit_differences(self_lse(z, scale, mask).view(count, -1).mean(0), positive, scale)


def _views_and_labels(embeddings: tuple[Tensor, ...], labels: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Split the arguments of `sup_con` into views ``(B, D)`` and labels ``(B,)``, and check them."""
    if labels is None:
        if len(embeddings) < 2:
            fail("labels", "be given", "None", "Pass the class of each image after the embeddings", TypeError)
        *embeddings, labels = embeddings  # type: ignore[assignment]
    views = list(embeddings)
    if len(views) == 1 and isinstance(views[0], Tensor) and views[0].ndim == 3:
        views = list(views[0].unbind(1))
    if not views:
        fail("embeddings", "have at least one view", 0, "Pass one tensor (B, D) per view, or one (B, V, D)")
    for view in views:
        check_pair("embeddings", views[0], "embeddings", view)
    check_labels(labels, len(views[0]))
    return views, labels


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
