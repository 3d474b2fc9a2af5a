"""Losses over the pairs of two towers: CLIP's softmax in both directions, SigLIP's sigmoid."""

import torch.nn.functional as F
from torch import Tensor

from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import Scalar, check_groups, check_pair, check_scalar, check_tile_size
from lightning_contrast.losses.kernels.logsumexp import NegativeMask, pair_lse
from lightning_contrast.losses.kernels.sigmoid import softplus_sums
from lightning_contrast.losses.negatives import AnchorBatch, Negatives, anchor_losses, as_negatives
from lightning_contrast.precision import full_precision, normalize

_SCALE_HINT = "Give the multiplier itself, `log_scale.exp()`, not its logarithm"


@full_precision
def clip_loss(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: Scalar,
    weighting: Negatives | str = "uniform",
    groups: Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Return the symmetric cross entropy between images and their texts.

    Implements the loss of CLIP (https://arxiv.org/abs/2103.00020) over the global batch, as OpenCLIP computes it with
    ``gather_with_grad=True``. Inputs are L2-normalised here; the similarity matrix is never formed.

    Args:
        image: Embeddings of the images, ``(B, D)``.
        text: Embeddings of their texts, ``(B, D)``.
        logit_scale: Multiplier of the cosine similarities, already exponentiated; > 0; a number, or a learned tensor
            of one element, which is not read on the host.
        weighting: How the negatives count, a `Negatives` or the name of one with its default numbers.
        groups: Group of each pair, ``(B,)`` integers: pairs of one group, such as known duplicates or samples of one
            class, are not negatives of each other; None: all other pairs are.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        Half the sum of the two means over the pairs of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of its range.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("image", image, "text", text)
    check_tile_size(tile_size)
    scale = check_scalar("logit_scale", logit_scale, _SCALE_HINT)
    check_groups(groups, len(image))
    weighting = as_negatives(weighting)
    image, text = normalize(image), normalize(text)
    positive = (image * text).sum(1)  # (B,)
    if weighting.is_uniform and groups is None:
        by_image, by_text = pair_lse(image, text, scale, NegativeMask(tile_size=tile_size))
        return global_mean(0.5 * (by_image + by_text) - positive * scale)
    mask = NegativeMask(skip_partner=True, groups=groups, tile_size=tile_size)
    by_image = anchor_losses(AnchorBatch(image, text, positive, scale, mask), weighting)
    by_text = anchor_losses(AnchorBatch(text, image, positive, scale, mask), weighting)
    return global_mean(0.5 * (by_image + by_text))


@full_precision
def siglip_loss(
    image: Tensor, text: Tensor, *, logit_scale: Scalar, logit_bias: Scalar, tile_size: int | None = None
) -> Tensor:
    """Return the sigmoid loss of all image-text pairs.

    Implements Algorithm 1 of SigLIP (https://arxiv.org/abs/2303.15343): a sum over the texts, a mean over the images
    of the global batch. Inputs are L2-normalised here. Across ranks the texts travel in a ring and only one rank's
    share is held at a time.

    Args:
        image: Embeddings of the images, ``(B, D)``.
        text: Embeddings of their texts, ``(B, D)``.
        logit_scale: Multiplier of the cosine similarities, already exponentiated; > 0; a number, or a learned tensor
            of one element, which is not read on the host.
        logit_bias: What is added to each logit, unitless; -10 at the start in the paper; a number, or a learned tensor
            of one element.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over the images of all ranks of the sum over all texts, a scalar in nats.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of its range.
        TypeError: If the embeddings are not floating point.
    """
    check_pair("image", image, "text", text)
    check_tile_size(tile_size)
    scale = check_scalar("logit_scale", logit_scale, _SCALE_HINT)
    bias: Scalar = logit_bias.reshape(()) if isinstance(logit_bias, Tensor) else float(logit_bias)
    image, text = normalize(image), normalize(text)
    matches = F.logsigmoid((image * text).sum(1) * scale + bias)  # (B,)
    return global_mean(softplus_sums(image, text, scale, bias, tile_size) - matches)
