"""Losses on assignments to prototypes: Sinkhorn-Knopp codes, SwAV, MSN."""

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
    """Compute soft assignments that use all prototypes about equally.

    Implements the Sinkhorn-Knopp iteration of SwAV (https://arxiv.org/abs/2006.09882), Algorithm 1, over the rows of
    all ranks. No gradient is computed.
    Differs from the reference implementation: it works on logarithms, so no score overflows and no sample or prototype
    is lost to underflow.

    Args:
        scores: Similarities of samples to prototypes, ``(B, K)``; ranks may hold different numbers of samples.
        epsilon: Divisor of the scores, > 0; 0.05 in SwAV; the teacher's temperature in DINOv2.
        iterations: Number of normalizations of prototypes and samples, >= 1; 3 in SwAV.
        mask: Which samples count, ``(B,)`` bool, at least one over all ranks; None: all. The others do not influence
            the result. Nothing is read on the host, so the shapes of a training step can stay fixed.

    Returns:
        Assignments, ``(B, K)``: each row sums to 1, each column over all ranks to about (samples / K).

    Raises:
        ValueError: If a shape is wrong, there are fewer than 2 prototypes, or a number is out of range.
        TypeError: If the scores are not floating point.
    """
    check_matrix("scores", scores)
    _check_prototypes(scores.shape[1])
    check_positive("epsilon", epsilon, "SwAV uses 0.05")
    check_at_least("iterations", iterations, 1)
    if mask is not None:
        require(
            mask.shape == scores.shape[:1],
            "mask",
            f"have shape ({len(scores)},)",
            tuple(mask.shape),
            "Pass one value per sample",
        )
    logits = scores / epsilon  # (B, K)
    for _ in range(iterations):
        counted = logits if mask is None else logits.masked_fill(~mask[:, None], -math.inf)
        by_prototype = counted.logsumexp(0, keepdim=True)  # (1, K)
        gathered = distributed.gather(by_prototype, [1] * distributed.world_size())  # (ranks, K)
        logits = logits - gathered.logsumexp(0)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.exp()


def _check_prototypes(count: int) -> None:
    require(count >= 2, "prototypes", "be at least 2", count, "With one prototype all assignments are equal")


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
    """Compute the swapped prediction loss of SwAV: each view predicts the codes of the global views.

    Implements Eq. 2 of SwAV (https://arxiv.org/abs/2006.09882) for multi-crop as the reference implementation does.
    The codes receive no gradient.

    Args:
        scores: Cosine similarities to the prototypes, one ``(B, K)`` per view, global views first.
        temperature: Divisor of the scores in the prediction; unitless, > 0; 0.1 in the paper.
        epsilon: See `sinkhorn`; > 0; 0.05 in the paper.
        iterations: See `sinkhorn`; >= 1; 3 in the paper.
        global_views: Number of views with codes, from 1 to the number of views.
        queue_scores: Scores of past embeddings, which are used for the codes only, one ``(Q, K)`` per global view;
            this rank's share of a queue.
        queue_mask: Which of them count, ``(Q,)`` bool; None: all.

    Returns:
        The mean over global views, other views and the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not match or a number is out of range.
        TypeError: If the scores are not floating point.
    """
    check_positive("temperature", temperature, "SwAV uses 0.1")
    check_at_least("global_views", global_views, 1)
    check_views("scores", scores, max(2, global_views))
    if queue_scores is not None and len(queue_scores) != global_views:
        fail("queue_scores", f"have {global_views} tensors", len(queue_scores), "Pass one per global view")
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
    """Compute the loss of masked siamese networks (MSN).

    Implements Eq. 1 of MSN (https://arxiv.org/abs/2204.07141) as the reference implementation does. Inputs are
    L2-normalized here; the targets receive no gradient.
    Differs from it: it sums the gradients of the prototypes over ranks; here their mean over ranks, which DDP takes,
    is the gradient of one process.

    Args:
        anchors: Embeddings of V views of each image, ``(V B, D)``, view-major.
        targets: Embeddings of the target view, ``(B, D)``.
        prototypes: Learned prototypes, ``(K, D)``.
        temperature: Divisor of the cosine similarities; unitless, > 0; 0.1 in the paper.
        target_sharpen_temperature: Targets are raised to the power of its inverse; unitless, > 0; 0.25 in the paper.
        me_max_weight: Weight of the mean entropy maximization term, >= 0; 1 in the paper.
        sinkhorn: Whether to balance the targets with 3 Sinkhorn iterations.

    Returns:
        The mean cross entropy over all anchors of all ranks plus the weighted term, a scalar in nats.

    Raises:
        ValueError: If shapes do not match or a number is out of range.
        TypeError: If the inputs are not floating point.
    """
    check_matrix("targets", targets)
    check_matrix("anchors", anchors, targets.shape[1])
    check_matrix("prototypes", prototypes, targets.shape[1])
    _check_prototypes(len(prototypes))
    check_positive("temperature", temperature, "MSN uses 0.1")
    check_positive("target_sharpen_temperature", target_sharpen_temperature, "MSN uses 0.25")
    check_not_negative("me_max_weight", me_max_weight)
    views, rest = divmod(len(anchors), len(targets)) if len(targets) else (1, len(anchors))  # a rank may be empty
    if rest or (len(targets) == 0 and not distributed.is_distributed()):
        hint = "Concatenate the views, each with all images in the same order"
        fail("anchors", f"have a multiple of {len(targets)} rows, at least one", len(anchors), hint)
    directions = normalize(prototypes)
    predictions = (normalize(anchors) @ directions.T / temperature).log_softmax(1)  # (V B, K)
    soft_targets = _msn_targets(targets, directions, temperature * target_sharpen_temperature, balance=sinkhorn)
    cross_entropy = global_mean(-(soft_targets.repeat(views, 1) * predictions).sum(1))
    # The mean prediction over the anchors of all ranks.
    count = distributed.all_reduce_sum(anchors.new_tensor(float(len(anchors))))
    mean = distributed.all_reduce_sum_with_gradient(predictions.exp().sum(0)) / count  # (K,)
    # log K minus the entropy, as the divergence from the uniform distribution, which does not cancel near 0.
    # A mean that underflows to 0 adds 0; without the clamp its logarithm would make the gradient NaN.
    relative = (mean * len(prototypes)).clamp_min(torch.finfo(mean.dtype).tiny)
    return torch.as_tensor(cross_entropy + me_max_weight * (mean * relative.log()).sum())


@torch.no_grad()
def _msn_targets(targets: Tensor, directions: Tensor, temperature: float, balance: bool) -> Tensor:
    """Compute sharpened assignments ``(B, K)``; a power of a softmax is a softmax with a lower temperature."""
    logits = (normalize(targets) @ directions.T / temperature).log_softmax(1)
    return sinkhorn(logits, epsilon=1.0, iterations=3) if balance else logits.exp()
