"""Losses against a protected attribute: FSCL, and a penalty on the dependence of features on it."""

import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch, check_positive, fail
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import check_floating, check_labels, check_matrix
from lightning_contrast.losses.labels import global_classes
from lightning_contrast.precision import full_precision, normalize


@full_precision
def fair_supcon_loss(
    features: Tensor, labels: Tensor | None, groups: Tensor, *, temperature: float, group_norm: bool = False
) -> Tensor:
    """Compute the fair supervised contrastive loss, whose negatives share the protected attribute of the anchor.

    Implements Eq. 6 of FSCL (https://arxiv.org/abs/2203.16209) as its reference implementation. Positives are the other
    embeddings of the anchor's class, of any group; the denominator holds the embeddings of other classes in the
    anchor's group and not the positive, so the loss can be negative. An anchor without such a negative gets its largest
    similarity, for unit rows that to itself, as the denominator. Without labels (FSCL*) the positives are the other
    views of the image, and the denominator holds all other embeddings of the group.
    Inputs are NOT normalized here, as in the reference implementation: pass unit rows.

    Args:
        features: Unit embeddings of V views, ``(B, V, D)``.
        labels: Class to be predicted, ``(B,)`` integers; below 0: unknown, a class of its own. None: FSCL*.
        groups: Protected attribute, ``(B,)`` integers; below 0: unknown, a group of its own.
        temperature: Divisor of the similarities, > 0; 0.1 in the paper.
        group_norm: FSCL+: divide the term of each positive by the number of embeddings that share class and group with
            it, and the sum of an anchor by the number of those that share its own. The reference implementation
            multiplies by the number of rows / 8, and so does this.

    Returns:
        The mean over the V B anchors of all ranks, a scalar in nats; an anchor without a positive counts as 0.

    Raises:
        ValueError: If shapes do not match, the batch is smaller than 2, the temperature is not above 0, or
            ``group_norm`` comes without labels.
        TypeError: If the features are not floating point, or labels or groups not integers.
    """
    check_floating("features", features)
    if features.ndim != 3:
        fail("features", "have shape (B, V, D)", tuple(features.shape), "Stack the views of an image in dimension 1")
    size, count, _ = features.shape
    if not distributed.is_distributed():
        check_batch("features", size)
    check_labels(groups, size, "groups")
    if labels is not None:
        check_labels(labels, size)
    elif group_norm:
        fail("group_norm", "be False without labels", group_norm, "Pass `labels`, or leave it out")
    check_positive("temperature", temperature, "FSCL uses 0.1")
    keys = distributed.gather_with_gradient(features).flatten(0, 1)  # (G V, D), the views of an image in a row
    images, all_images = (x.repeat_interleave(count) for x in global_classes(None, size, features.device))
    classes, all_classes = (x.repeat_interleave(count) for x in global_classes(labels, size, features.device))
    own, every = (x.repeat_interleave(count) for x in global_classes(groups, size, features.device))
    rows = torch.arange(len(images), device=features.device) + count * images[:1]
    itself = torch.arange(len(keys), device=features.device) == rows[:, None]  # (B V, G V)
    logits = features.flatten(0, 1) @ keys.T / temperature
    same_class, same_group = classes[:, None] == all_classes, own[:, None] == every
    if labels is None:
        positive, negative = (images[:, None] == all_images) & ~itself, same_group & ~itself
    else:
        positive, negative = same_class & ~itself, same_group & ~same_class
    lowest = torch.finfo(logits.dtype).min
    lse = logits.masked_fill(~negative, lowest).logsumexp(1)
    lse = torch.where(negative.any(1), lse, logits.detach().amax(1))
    terms = (lse[:, None] - logits).masked_fill(~positive, 0.0)
    if group_norm:
        alike = (same_class & same_group & ~itself).sum(1)  # (B V,)
        weights = distributed.gather(alike).clamp(min=1)  # (G V,)
        losses = (terms / weights).sum(1) / (alike + 1) * (len(keys) / 8)
    else:
        losses = terms.sum(1) / positive.sum(1).clamp(min=1)
    return global_mean(losses.view(size, count).mean(1))


@full_precision
def hsic_loss(features: Tensor, groups: Tensor, *, bandwidth: float = 1.0) -> Tensor:
    """Compute how much features depend on a protected attribute, by the Hilbert-Schmidt independence criterion.

    Implements the biased estimate of Gretton et al. 2005 (https://doi.org/10.1007/11564089_7), Eq. 9,
    ``tr(K H L H) / (n - 1)^2``, with a Gaussian kernel of the features, which are L2-normalized here, and the kernel of
    the attribute that is 1 for images of one group and else 0. Its gradient makes the groups alike in all respects,
    also where the attribute and the task are related.

    Args:
        features: One row per image, ``(B, D)``.
        groups: Protected attribute, ``(B,)`` integers; images with one below 0, which means unknown, are left out.
        bandwidth: Standard deviation of the kernel, in units of the distance of unit vectors, > 0.

    Returns:
        The estimate over the images of all ranks, a scalar in [0, 1]; 0 with fewer than 2 known images or one group.

    Raises:
        ValueError: If shapes do not match, or ``bandwidth`` is not above 0.
        TypeError: If the features are not floating point, or the groups not integers.
    """
    check_matrix("features", features)
    check_labels(groups, len(features), "groups")
    check_positive("bandwidth", bandwidth)
    rows = normalize(features)
    columns, others = distributed.gather_with_gradient(rows), distributed.gather(groups)
    known, total = (groups >= 0).to(rows.dtype), (others >= 0).sum()
    same = ((groups[:, None] == others) & (others >= 0)).to(rows.dtype)  # (B, G)
    share = same.sum(1) / total.clamp(min=1)  # (B,): of the images, those in the group of the image
    shares = distributed.gather(share)
    centered = same - share[:, None] - shares + (distributed.gather(known) * shares).sum() / total.clamp(min=1)
    distances = 2 - 2 * (rows @ columns.T)
    kernel = torch.exp(distances / (-2 * bandwidth**2)) * (others >= 0)
    values = (kernel * centered).sum(1) * known * total / (total - 1).clamp(min=1).square()
    return global_mean(values, torch.where(total > 0, known, torch.ones_like(known)))
