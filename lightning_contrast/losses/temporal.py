"""Losses between moments of clips: instance, local-local and global-local contrast of TCLR.

Paper: https://arxiv.org/abs/2101.07974. Reference implementation: DAVEISHAN/TCLR. Differs from it: all embeddings are
L2-normalized here, in the program by the head; sums and means cover the videos of all ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import require
from lightning_contrast.losses.checks import Scalar, check_floating, inverse_temperature
from lightning_contrast.losses.labels import global_classes
from lightning_contrast.precision import full_precision

_SHAPE = "(2 augmentations, J clips, B videos, D)"


def _check_clips(name: str, clips: Tensor) -> None:
    """Check embeddings ``(A, J, B, D)`` of at least two augmentations and two clips of a video."""
    check_floating(name, clips)
    hint = "Stack the embeddings of a video's clips, one row per augmentation; a video needs at least two clips"
    ok = clips.ndim == 4 and clips.shape[0] == 2 and clips.shape[1] >= 2 and clips.shape[3] > 0
    require(ok, name, f"have the shape {_SHAPE} with J >= 2", tuple(clips.shape), hint)


@full_precision
def tclr_instance_loss(dense: Tensor, *, temperature: Scalar) -> Tensor:
    """Compute TCLR's instance contrast of local clips: clips of one video, at any moment, are positives.

    The NT-Xent of the batch (as `nt_xent`, a mean over 2B anchors), summed over all ordered pairs of different
    (augmentation, clip) and divided by the number of clips J: 56 pairs and 4 in the paper. Embeddings are
    L2-normalized here. Memory grows with the square of the number of clips in the global batch.

    Args:
        dense: Embeddings of the local clips, ``(2, J, B, D)``.
        temperature: Divisor of the cosine similarities, > 0.

    Returns:
        The sum over pairs divided by J, a scalar in nats.

    Raises:
        ValueError: If the shape is another one, or the temperature is not above 0.
        TypeError: If the embeddings are not floating point.
    """
    _check_clips("dense", dense)
    scale = inverse_temperature(temperature)
    count = dense.shape[1]
    own = F.normalize(dense, dim=-1).flatten(0, 1).transpose(0, 1)  # (B, K, D): K = 2J clips of each video
    every = distributed.gather_with_gradient(own)  # (N, K, D): of all ranks
    logits = torch.einsum("bkd,nld->bkln", own, every) * scale  # (B, K, K, N)
    rows = global_classes(None, len(own), own.device)[0]  # (B,): the places of the own videos
    partner = logits.gather(3, rows[:, None, None, None].expand(*logits.shape[:3], 1)).squeeze(3)  # (B, K, K)
    same_clip = torch.eye(2 * count, dtype=torch.bool, device=own.device)[None, :, :, None]  # (1, K, K, 1)
    itself = same_clip & F.one_hot(rows, len(every)).bool()[:, None, None]  # (B, K, K, N)
    sums = logits.masked_fill(itself, -torch.inf).logsumexp(3)  # (B, K, K)
    within = sums.diagonal(dim1=1, dim2=2)[:, :, None]  # (B, K, 1): -inf if there is one video
    losses = torch.logaddexp(sums, within.expand_as(sums)) - partner
    return distributed.global_mean(losses.masked_fill(same_clip[..., 0], 0).sum((1, 2)) / count)


@full_precision
def tclr_local_loss(dense: Tensor, *, temperature: Scalar) -> Tensor:
    """Compute TCLR's local-local contrast: other moments of the same video are negatives.

    For each video the NT-Xent of its J clips under two augmentations, a mean over 2J anchors; summed over the videos of
    the global batch as in the reference implementation, so that it grows with the batch. Embeddings are L2-normalized
    here.

    Args:
        dense: Embeddings of the local clips, ``(2, J, B, D)``.
        temperature: Divisor of the cosine similarities, > 0.

    Returns:
        The sum over the videos of all ranks, a scalar in nats.

    Raises:
        ValueError: If the shape is another one, or the temperature is not above 0.
        TypeError: If the embeddings are not floating point.
    """
    _check_clips("dense", dense)
    scale = inverse_temperature(temperature)
    count, videos = dense.shape[1:3]
    clips = F.normalize(dense, dim=-1).flatten(0, 1).transpose(0, 1)  # (B, 2J, D)
    itself = torch.eye(2 * count, dtype=torch.bool, device=dense.device)  # (2J, 2J)
    logits = (clips @ clips.transpose(1, 2) * scale).masked_fill(itself, -torch.inf)  # (B, 2J, 2J)
    partner = logits.logsumexp(2) - logits.diagonal(count, 1, 2).repeat(1, 2)  # (B, 2J): the logits are symmetric
    total = sum(distributed.batch_sizes(videos, dense.device))
    return distributed.global_mean(partner.mean(1)) * total


@full_precision
def tclr_global_local_loss(sparse_steps: Tensor, dense: Tensor, *, temperature: Scalar) -> Tensor:
    """Compute TCLR's global-local contrast: step i of the global clip matches the local clip of that moment.

    For each of the 2 x 2 pairs of augmentations, the cross entropy of each step against the J local clips of its video
    and of each local clip against the J steps, summed over steps, clips and videos and divided by 2B. Embeddings are
    L2-normalized here.

    Args:
        sparse_steps: Embeddings of the J time steps of the global clip, ``(2, J, B, D)``.
        dense: Embeddings of the J local clips, in temporal order, ``(2, J, B, D)``.
        temperature: Divisor of the cosine similarities, > 0.

    Returns:
        Half the mean over the videos of all ranks, a scalar in nats.

    Raises:
        ValueError: If the shapes are others or differ, or the temperature is not above 0.
        TypeError: If the embeddings are not floating point.
    """
    _check_clips("sparse_steps", sparse_steps)
    _check_clips("dense", dense)
    hint = "Pool the steps of the global clip to the number of local clips"
    require(dense.shape == sparse_steps.shape, "dense", "have the shape of `sparse_steps`", tuple(dense.shape), hint)
    scale = inverse_temperature(temperature)
    steps, clips = F.normalize(sparse_steps, dim=-1), F.normalize(dense, dim=-1)
    logits = torch.einsum("aibd,cjbd->bacij", steps, clips) * scale  # (B, 2, 2, J, J)
    matches = logits.diagonal(dim1=3, dim2=4)  # (B, 2, 2, J)
    losses = logits.logsumexp(4) + logits.logsumexp(3) - 2 * matches
    return distributed.global_mean(losses.sum((1, 2, 3)) / 2)
