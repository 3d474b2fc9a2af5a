"""Losses on image-text pairs: CLIP's softmax in both directions, SigLIP's sigmoid.

The ``naive_*`` functions are the formulas, for one process; the tests compare the losses with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast._checks import require
from lightning_contrast.distributed import gather_with_gradient, global_mean
from lightning_contrast.losses.checks import Scalar, check_groups, check_pair, check_scalar, check_tile_size
from lightning_contrast.losses.kernels.logsumexp import NegativeMask, pair_lse
from lightning_contrast.losses.kernels.normalization import normalize_rows
from lightning_contrast.losses.kernels.sigmoid import softplus_sums
from lightning_contrast.losses.labels import separate_unknown
from lightning_contrast.losses.negatives import (
    AnchorBatch,
    Negatives,
    anchor_losses,
    as_negatives,
    losses_from_negatives,
)
from lightning_contrast.precision import full_precision

_SCALE_HINT = "Pass the multiplier itself, `log_scale.exp()`, not its logarithm"


def naive_clip_loss(image: Tensor, text: Tensor, *, logit_scale: Scalar) -> Tensor:
    """Reference form of `clip_loss`: materializes the ``(B, B)`` similarity matrix.

    Args:
        image: Embeddings of the images, ``(B, D)``.
        text: Embeddings of their texts, ``(B, D)``.
        logit_scale: Multiplier of the cosine similarities, > 0.
    """
    logits = logit_scale * (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T)  # (B, B)
    match = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2


@full_precision
def clip_loss(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: Scalar,
    logit_bias: Scalar | None = None,
    weighting: Negatives | str = "uniform",
    groups: Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Compute the symmetric cross entropy between images and their texts.

    Implements the loss of CLIP (https://arxiv.org/abs/2103.00020), Figure 3, over the global batch, as OpenCLIP does
    with ``gather_with_grad=True``. Inputs are L2-normalized here; the similarity matrix is never materialized.

    Args:
        image: Embeddings of the images, ``(B, D)``.
        text: Embeddings of their texts, ``(B, D)``.
        logit_scale: Multiplier of the cosine similarities, already exponentiated; > 0; a number, or a learned tensor
            with one element, which is not read on the host.
        logit_bias: Added to each logit, unitless; a number, or a learned tensor with one element. The softmax cancels
            it: value and gradients are those without, and its own gradient is 0.
        weighting: How the negatives are weighted, a `Negatives` or the name of one with its default values.
        groups: Group of each pair, ``(B,)`` integers: pairs of the same group, such as known duplicates or samples of
            the same class, are not negatives of each other; below 0: in no group; None: every other pair is a negative.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        Half the sum of the two means over the pairs of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("image", image, "text", text)
    check_tile_size(tile_size)
    scale = check_scalar("logit_scale", logit_scale, _SCALE_HINT)
    check_groups(groups, len(image))
    weighting = as_negatives(weighting)
    image, text = normalize_rows(image), normalize_rows(text)
    positive = (image * text).sum(1)  # (B,)
    if isinstance(logit_bias, Tensor):  # a parameter without a gradient would stop DDP
        positive = positive + 0.0 * logit_bias.reshape(()).to(positive.dtype)
    if weighting.is_uniform and groups is None:
        both = torch.stack(pair_lse(image, text, scale, NegativeMask(skip_partner=True, tile_size=tile_size)))  # (2, B)
        return global_mean(losses_from_negatives(both, positive, scale).mean(0))
    groups = None if groups is None else separate_unknown(groups)
    mask = NegativeMask(skip_partner=True, groups=groups, tile_size=tile_size)
    by_image = anchor_losses(AnchorBatch(image, text, positive, scale, mask), weighting)
    by_text = anchor_losses(AnchorBatch(text, image, positive, scale, mask), weighting)
    return global_mean(0.5 * (by_image + by_text))


def naive_siglip_loss(image: Tensor, text: Tensor, *, logit_scale: Scalar, logit_bias: Scalar) -> Tensor:
    """Reference form of `siglip_loss`: materializes the ``(B, B)`` similarity matrix.

    Args:
        image: Embeddings of the images, ``(B, D)``.
        text: Embeddings of their texts, ``(B, D)``.
        logit_scale: Multiplier of the cosine similarities, > 0.
        logit_bias: Added to each logit.
    """
    logits = logit_scale * (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T) + logit_bias  # (B, B)
    sign = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1  # 1 for pairs that match, else -1
    return -F.logsigmoid(sign * logits).sum(1).mean()


@full_precision
def siglip_loss(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: Scalar,
    logit_bias: Scalar,
    groups: Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Compute the sigmoid loss of all image-text pairs.

    Implements Algorithm 1 of SigLIP (https://arxiv.org/abs/2303.15343): a sum over the texts, a mean over the images
    of the global batch. Inputs are L2-normalized here. With several ranks the texts are exchanged in a ring, so that
    each rank holds the texts of one other rank at a time.

    Args:
        image: Embeddings of the images, ``(B, D)``.
        text: Embeddings of their texts, ``(B, D)``.
        logit_scale: Multiplier of the cosine similarities, already exponentiated; > 0; a number, or a learned tensor
            with one element, which is not read on the host.
        logit_bias: Added to each logit, unitless; starts at -10 in the paper; a number, or a learned tensor with one
            element.
        groups: Group of each pair, ``(B,)`` integers: an image and the text of another pair of the same group, such as
            known duplicates, count neither as match nor as mismatch; below 0: in no group; None: every other pair is a
            mismatch.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the images of all ranks of the sum over all texts, a scalar in nats.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("image", image, "text", text)
    check_tile_size(tile_size)
    scale = check_scalar("logit_scale", logit_scale, _SCALE_HINT)
    check_groups(groups, len(image))
    groups = None if groups is None else separate_unknown(groups)
    bias: Scalar = logit_bias.reshape(()) if isinstance(logit_bias, Tensor) else float(logit_bias)
    image, text = normalize_rows(image), normalize_rows(text)
    matches = F.logsigmoid((image * text).sum(1) * scale + bias)  # (B,)
    return global_mean(softplus_sums(image, text, scale, bias, tile_size, groups) - matches)


def clip_distillation_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    logit_scale: Scalar,
    teacher_logit_scale: Scalar,
) -> Tensor:
    """Compute the cross entropy of CLIP's logits with those of a teacher, in both directions.

    Implements OpenCLIP's distillation term, to be added to `clip_loss` with weight 1, over the global batch. Inputs are
    L2-normalized here. Each rank holds the similarities of its own rows to all columns.

    Args:
        image: Embeddings of the images, ``(B, D)``.
        text: Embeddings of their texts, ``(B, D)``.
        teacher_image: The teacher's embeddings of the images, ``(B, T)``; they receive gradient if they require it.
        teacher_text: The teacher's embeddings of the texts, ``(B, T)``.
        logit_scale: Multiplier of the cosine similarities, already exponentiated; > 0.
        teacher_logit_scale: The teacher's own multiplier; > 0.

    Returns:
        Half the sum of the two means over the rows of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("image", image, "text", text)
    check_pair("teacher_image", teacher_image, "teacher_text", teacher_text)
    hint = "Pass the teacher's embeddings of the same batch"
    require(len(image) == len(teacher_image), "teacher_image", f"have {len(image)} rows", len(teacher_image), hint)
    scale = check_scalar("logit_scale", logit_scale, _SCALE_HINT)
    teacher_scale = check_scalar("teacher_logit_scale", teacher_logit_scale, _SCALE_HINT)
    return _distillation(image, text, teacher_image, teacher_text, scale, teacher_scale)


@full_precision
def _distillation(
    image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, scale: Scalar, teacher_scale: Scalar
) -> Tensor:
    """Compute the loss of `clip_distillation_loss` of checked embeddings ``(B, D)`` and ``(B, T)``, a scalar."""
    student = [normalize_rows(image), normalize_rows(text)]
    teacher = [normalize_rows(teacher_image), normalize_rows(teacher_text)]
    losses = []
    for rows, columns in ((0, 1), (1, 0)):
        own = scale * (student[rows] @ gather_with_gradient(student[columns]).T)  # (B_r, B)
        target = teacher_scale * (teacher[rows] @ gather_with_gradient(teacher[columns]).T)
        losses.append(-(target.softmax(1) * own.log_softmax(1)).sum(1))
    return global_mean(0.5 * (losses[0] + losses[1]))
