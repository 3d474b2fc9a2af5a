"""Losses on assignments to prototypes: Sinkhorn codes, SwAV, MSN."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_not_negative, check_positive, fail, require
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import check_matrix, check_views
from lightning_contrast.precision import full_precision, normalize


@full_precision
@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int, mask: Tensor | None = None) -> Tensor:
    """Return soft assignments that use all prototypes about equally.

    Implements the Sinkhorn-Knopp iteration of SwAV (https://arxiv.org/abs/2006.09882), over the rows of all ranks.
    Works on logarithms, so that no score overflows and no sample or prototype is lost to underflow. Without gradient.

    Args:
        scores: Similarities of samples to prototypes, ``(B, K)``; ranks may hold different numbers of samples.
        epsilon: Divisor of the scores, > 0; 0.05 in SwAV; the teacher's temperature in DINOv2.
        iterations: Number of normalisations of prototypes and samples, >= 1; 3 in SwAV.
        mask: Which samples there are, ``(B,)`` bool, at least one of all ranks; None is all. The others change
            nothing. They are not counted on the host, so the shapes of a step can stay fixed.

    Returns:
        Assignments, ``(B, K)``: each row sums to 1, each column over all ranks to about (samples / K).

    Raises:
        ValueError: If a shape is wrong, there are fewer than 2 prototypes, or a number is out of its range.
        TypeError: If the scores are not floating point.
    """
    check_matrix("scores", scores)
    _check_prototypes(scores.shape[1])
    check_positive("epsilon", epsilon, "SwAV uses 0.05")
    check_at_least("iterations", iterations, 1)
    if mask is not None:
        require(mask.shape == scores.shape[:1], "mask", f"be ({len(scores)},)", tuple(mask.shape), "Mask whole samples")
    logits = scores / epsilon  # (B, K)
    for _ in range(iterations):
        counted = logits if mask is None else logits.masked_fill(~mask[:, None], -math.inf)
        by_prototype = counted.logsumexp(0, keepdim=True)  # (1, K)
        everyone = distributed.gather(by_prototype, [1] * distributed.world_size())  # (ranks, K)
        logits = logits - everyone.logsumexp(0)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.exp()


def _check_prototypes(count: int) -> None:
    require(count >= 2, "prototypes", "be at least 2", count, "With one prototype all samples are the same")


@full_precision
def swav_loss(
    scores: Sequence[Tensor],
    *,
    temperature: float,
    epsilon: float,
    iterations: int,
    global_views: int = 2,
    queue_scores: Sequence[Tensor] | None = None,
    queue_mask: Tensor | None = None,
) -> Tensor:
    """Return SwAV's loss: each view predicts the codes of the global views.

    Implements Eq. 2 of SwAV (https://arxiv.org/abs/2006.09882) for multi-crop as in the authors' program. The codes
    receive no gradient.

    Args:
        scores: Cosine similarities to the prototypes, one ``(B, K)`` a view, global views first.
        temperature: Divisor of the scores in the prediction; unitless, > 0; 0.1 in the paper.
        epsilon: See `sinkhorn`; > 0; 0.05 in the paper.
        iterations: See `sinkhorn`; >= 1; 3 in the paper.
        global_views: Number of views that give codes, >= 1, at most the number of views.
        queue_scores: Scores of past embeddings that only take part in making the codes, one ``(Q, K)`` for each global
            view; this rank's share of a queue that all ranks hold.
        queue_mask: Which of them take part, ``(Q,)`` bool; None is all.

    Returns:
        The mean over global views, other views and the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not fit or a number is out of its range.
        TypeError: If the scores are not floating point.
    """
    check_positive("temperature", temperature, "SwAV uses 0.1")
    check_at_least("global_views", global_views, 1)
    check_views("scores", scores, max(2, global_views))
    if queue_scores is not None and len(queue_scores) != global_views:
        fail("queue_scores", f"have {global_views} tensors", len(queue_scores), "Give one for each global view")
    predictions = [(view / temperature).log_softmax(1) for view in scores]
    losses = []
    for index in range(global_views):
        view = pool = scores[index].detach()
        mask = None
        if queue_scores is not None:
            pool = torch.cat([queue_scores[index].detach().to(view.dtype), view])
            mask = None if queue_mask is None else torch.cat([queue_mask, queue_mask.new_ones(len(view))])
        codes = sinkhorn(pool, epsilon=epsilon, iterations=iterations, mask=mask)[len(pool) - len(view) :]
        losses += [-(codes * p).sum(1) for other, p in enumerate(predictions) if other != index]
    return global_mean(torch.stack(losses).mean(0))


@full_precision
def msn_loss(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    temperature: float,
    target_sharpen_temperature: float,
    me_max_weight: float,
    sinkhorn: bool,
) -> Tensor:
    """Return the loss of masked siamese networks.

    Implements Eq. 1 of MSN (https://arxiv.org/abs/2204.07141) as in the authors' program. Inputs are L2-normalised
    here; the targets receive no gradient.
    Differs from it: the program sums the prototypes' gradients over ranks; here their mean over ranks, which DDP
    takes, is the gradient of one process.

    Args:
        anchors: Embeddings of V views of each image, ``(V B, D)``, view-major.
        targets: Embeddings of the target view, ``(B, D)``.
        prototypes: Learned prototypes, ``(K, D)``.
        temperature: Divisor of the cosine similarities; unitless, > 0; 0.1 in the paper.
        target_sharpen_temperature: Targets are raised to the power of one over it; in (0, 1] in the paper 0.25.
        me_max_weight: Weight of the distance of the mean prediction to uniform, >= 0; 1 in the paper.
        sinkhorn: Whether the targets are balanced by 3 Sinkhorn iterations.

    Returns:
        The mean cross entropy over all anchors of all ranks plus the weighted term, a scalar in nats.

    Raises:
        ValueError: If shapes do not fit or a number is out of its range.
        TypeError: If the inputs are not floating point.
    """
    check_matrix("targets", targets)
    check_matrix("anchors", anchors, targets.shape[1])
    check_matrix("prototypes", prototypes, targets.shape[1])
    _check_prototypes(len(prototypes))
    check_positive("temperature", temperature, "MSN uses 0.1")
    check_positive("target_sharpen_temperature", target_sharpen_temperature, "MSN uses 0.25")
    check_not_negative("me_max_weight", me_max_weight)
    views, rest = divmod(len(anchors), len(targets)) if len(targets) else (1, len(anchors))  # a rank may have none
    if rest or (len(targets) == 0 and not distributed.is_distributed()):
        hint = "Stack the views of all images one after the other"
        fail("anchors", f"have a multiple of {len(targets)} rows, at least one", len(anchors), hint)
    directions = normalize(prototypes)
    predictions = (normalize(anchors) @ directions.T / temperature).log_softmax(1)  # (V B, K)
    goals = _msn_targets(targets, directions, temperature * target_sharpen_temperature, balance=sinkhorn)
    goals = goals.repeat(views, 1)
    cross_entropy = global_mean(-(goals * predictions).sum(1))
    # The entropy is that of the mean over all ranks' anchors.
    count = distributed.all_reduce_sum(anchors.new_tensor(float(len(anchors))))
    mean = distributed.all_reduce_sum_with_gradient(predictions.exp().sum(0)) / count  # (K,)
    # A prototype whose mean underflows to 0 adds 0; its logarithm would make the gradient NaN.
    entropy = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
    return torch.as_tensor(cross_entropy + me_max_weight * (math.log(len(prototypes)) - entropy))


@torch.no_grad()
def _msn_targets(targets: Tensor, directions: Tensor, temperature: float, balance: bool) -> Tensor:
    """Return sharpened assignments: a power of a softmax is a softmax at a lower temperature."""
    chances = (normalize(targets) @ directions.T / temperature).log_softmax(1)
    return sinkhorn(chances, epsilon=1.0, iterations=3) if balance else chances.exp()
