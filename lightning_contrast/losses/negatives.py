"""Weighting of the negatives of an anchor: one interface for NT-Xent, InfoNCE with a queue, and CLIP.

With the cosine similarity ``p`` of an anchor to its positive, ``n`` to its N negatives, and temperature T:

- ``"uniform"``: all negatives weigh the same, ``log(e^(p/T) + sum e^(n/T)) - p/T``.
- ``"debiased"``: the share ``tau_plus`` of false negatives is subtracted from the sum
  (https://arxiv.org/abs/2007.00224).
- ``"hard"``: debiased, and each negative has weight ``e^(beta n/T)`` (https://arxiv.org/abs/2010.04592).
- ``"decoupled"``: without the positive in the denominator, ``log sum e^(n/T) - p/T``
  (https://arxiv.org/abs/2110.06848).
- ``"decoupled_weighted"``: decoupled, with lower weights for positives that are similar already (width ``sigma``).
- ``"top_k"``: uniform over the ``k`` most similar negatives.
- ``"heated"``: each negative has its own temperature ``T (1 - heat (1 + n)/2)``, between T for the opposite direction
  and ``T (1 - heat)`` for the same direction. ``"hard"`` in comparison uses the temperature ``T/(1 + beta)`` for all
  negatives and divides by the mean weight, which keeps the size of the sum; ``"heated"`` sharpens similar negatives
  only, preserves the order of similarities for every ``heat``, and increases the sum.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_choice, check_interval, check_not_negative, check_positive
from lightning_contrast.losses.checks import Scalar
from lightning_contrast.losses.kernels.logsumexp import NegativeMask, rows_lse, self_lse, shards_lse
from lightning_contrast.losses.kernels.per_row import per_row

KINDS = ("uniform", "debiased", "hard", "decoupled", "decoupled_weighted", "top_k", "heated")


@dataclass(frozen=True)
class Negatives:
    """A weighting of negatives and its parameters; the module's docstring has the formulas.

    Args:
        kind: ``"uniform"``, ``"debiased"``, ``"hard"``, ``"decoupled"``, ``"decoupled_weighted"``, ``"top_k"`` or
            ``"heated"``.
        tau_plus: Share of false negatives, about 1 / number of classes, in [0, 1); for debiased and hard.
        beta: Concentration on hard negatives, >= 0; 0 is debiased; for hard.
        sigma: Width of the weighting of positives in units of the cosine, > 0; for decoupled_weighted.
        k: Number of negatives that count, >= 1; for top_k.
        heat: Relative decrease of the temperature of the most similar negative, in [0, 1); 0 is uniform; for heated.

    Raises:
        ValueError: If the kind is unknown or a number is out of range.
    """

    kind: str = "uniform"
    tau_plus: float = 0.1
    beta: float = 1.0
    sigma: float = 0.5
    k: int = 64
    heat: float = 0.5

    def __post_init__(self) -> None:
        check_choice("negatives", self.kind, KINDS)
        check_interval("tau_plus", self.tau_plus, "[0, 1)", "Usual is 1 / number of classes")
        check_not_negative("beta", self.beta)
        check_positive("sigma", self.sigma)
        check_at_least("k", self.k, 1)
        check_interval("heat", self.heat, "[0, 1)", "0 gives all negatives the same temperature")

    @property
    def is_uniform(self) -> bool:
        """Whether all negatives weigh the same and the positive is in the denominator."""
        return self.kind == "uniform"


def as_negatives(weighting: Negatives | str | Mapping[str, Any]) -> Negatives:
    """Convert the name of a weighting, or the dict of its fields, to `Negatives`."""
    if isinstance(weighting, Mapping):  # from a checkpoint
        return Negatives(**weighting)
    return weighting if isinstance(weighting, Negatives) else Negatives(weighting)


@dataclass(frozen=True)
class AnchorBatch:
    """The anchors of this rank with their positives and negatives.

    Args:
        x: Unit rows, ``(N, D)``.
        y: Unit columns, ``(M, D)``.
        positive: Cosine similarity of each anchor to its positive, ``(N,)``.
        scale: 1 / temperature.
        mask: Which columns are negatives; the positive must be masked.
        views: True: ``y`` is ``x``, the two views of N / 2 images.
        sharded: True: ``y`` is this rank's share of the columns. False: every rank holds all columns.
        stays: Of a share without gradient: it is not gathered, only sums over it are.
    """

    x: Tensor
    y: Tensor
    positive: Tensor
    scale: Scalar
    mask: NegativeMask
    views: bool = False
    sharded: bool = True
    stays: bool = False

    def lse(self, scale: Scalar) -> Tensor:
        """Compute the log-sum-exp of the scaled similarities to the negatives, ``(N,)``."""
        if self.views:
            return self_lse(self.x, scale, self.mask)
        if self.stays:
            return shards_lse(self.x, self.y, scale, self.mask)
        return rows_lse(self.x, self.y, scale, self.mask, sharded=self.sharded)

    def per_row(self, function: Callable[..., Tensor]) -> Tensor:
        """Compute ``function(similarities, bias, scale)`` of each anchor, ``(N,)``; see `kernels.per_row`."""
        scale = self.scale if isinstance(self.scale, Tensor) else self.x.new_tensor(self.scale)
        return per_row(function, self.x, self.y, self.mask, scale, views=self.views, sharded=self.sharded)

    def count(self) -> Tensor:
        """Count the negatives of each anchor, ``(N,)``."""
        gathered = self.sharded and distributed.is_distributed()
        counted = self.mask.column_mask
        weights = self.x.new_ones(len(self.y)) if counted is None else counted.to(self.x.dtype)
        total = distributed.all_reduce_sum(weights.sum()) if gathered else weights.sum()
        groups = self.mask.groups
        if groups is None:
            masked = (1 + int(self.views)) if self.mask.skip_partner else int(self.views)
            return (total - masked).expand(len(self.x))
        column_groups = groups if self.mask.column_groups is None else self.mask.column_groups
        if gathered:
            column_groups, weights = distributed.gather(column_groups), distributed.gather(weights)
        ordered, order = column_groups.sort()
        below = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])
        same = below[torch.searchsorted(ordered, groups, right=True)] - below[torch.searchsorted(ordered, groups)]
        return total - same


def logit_differences(lse: Tensor, positive: Tensor, scale: Scalar) -> Tensor:
    """Compute ``lse - scale * positive``, in one kernel if the scale is a number.

    Args:
        lse: Log-sum-exp of the logits of the negatives, ``(..., N)``.
        positive: Cosine similarity to the positive, ``(N,)``.
        scale: 1 / temperature, a number or a scalar tensor.

    Returns:
        ``(..., N)`` in nats.
    """
    if isinstance(scale, Tensor):
        return lse - positive * scale
    return torch.add(lse, positive, alpha=-scale)


def losses_from_negatives(lse: Tensor, positive: Tensor, scale: Scalar) -> Tensor:
    """Compute ``-log softmax`` of the positive as ``softplus(lse - scale * positive)``.

    The log-sum-exp of all logits minus the positive's would be the difference of two numbers of size 1 / temperature:
    it cannot represent losses below their rounding, may be negative, and has a gradient of mere rounding there.

    Args:
        lse: Log-sum-exp of the logits of the negatives only, ``(..., N)``; minus infinity where there are none.
        positive: Cosine similarity to the positive, ``(N,)``.
        scale: 1 / temperature, a number or a scalar tensor.

    Returns:
        ``(..., N)`` in nats, never negative; its relative error is the rounding of the logits.
    """
    # Above the threshold softplus is the identity up to exp(-80); exp(80) fits float32.
    return F.softplus(logit_differences(lse, positive, scale), threshold=80.0)


def naive_anchor_losses(
    positive: Tensor, negatives: Tensor, *, temperature: Scalar, weighting: Negatives | str
) -> Tensor:
    """Reference form of `anchor_losses`: takes the ``(N, M)`` matrix of cosine similarities to the negatives.

    Args:
        positive: Cosine similarity of each anchor to its positive, ``(N,)``.
        negatives: Cosine similarities to the negatives, ``(N, M)``.
        temperature: Divisor of the cosine similarities, > 0.
        weighting: How the negatives are weighted.

    Returns:
        ``(N,)`` in nats.
    """
    weighting, count = as_negatives(weighting), negatives.shape[1]
    logits, p = negatives / temperature, positive / temperature  # (N, M), (N,)
    if weighting.kind == "decoupled_weighted":
        p = (2 - len(p) * (positive.detach() / weighting.sigma).softmax(0)) * p
    if weighting.kind.startswith("decoupled"):
        return logits.logsumexp(1) - p
    if weighting.kind == "top_k":
        logits = logits.topk(min(weighting.k, count)).values
    if weighting.kind == "heated":
        logits = logits / (1 - weighting.heat * (1 + negatives) / 2)
    total = logits.exp().sum(1)
    if weighting.kind in ("debiased", "hard"):
        if weighting.kind == "hard":
            total = (logits.exp() * (weighting.beta * logits).softmax(1) * count).sum(1)
        total = (total - weighting.tau_plus * count * p.exp()) / (1 - weighting.tau_plus)
        total = total.clamp_min(count * math.exp(-1 / float(temperature)))
    return (p.exp() + total).log() - p


def anchor_losses(anchors: AnchorBatch, weighting: Negatives) -> Tensor:
    """Compute the loss of each anchor.

    Args:
        anchors: Anchors, positives and negatives.
        weighting: How the negatives are weighted.

    Returns:
        ``(N,)`` in nats.
    """
    if weighting.kind in ("decoupled", "decoupled_weighted"):
        lse, positive = anchors.lse(anchors.scale), anchors.positive
        if weighting.kind == "decoupled_weighted":
            positive = _positive_weights(positive, weighting.sigma) * positive
        # An anchor without negatives, for example with an empty queue, has no loss.
        return torch.where(lse.isneginf(), 0.0, logit_differences(lse, positive, anchors.scale))
    if weighting.kind in ("debiased", "hard"):
        lse = _corrected(anchors, weighting)
    elif weighting.kind == "top_k":
        lse = anchors.per_row(lambda s, bias, scale: _lse_of_top(s + bias, scale, weighting.k))
    elif weighting.kind == "heated":
        lse = anchors.per_row(lambda s, bias, scale: _lse_heated(s, bias, scale, weighting.heat))
    else:
        lse = anchors.lse(anchors.scale)
    return losses_from_negatives(lse, anchors.positive, anchors.scale)


def _lse_of_top(similarities: Tensor, scale: Tensor, k: int) -> Tensor:
    """Compute the log-sum-exp of the ``k`` largest of each row."""
    values = similarities.topk(min(k, similarities.shape[1]), dim=1).values
    masked = values.isneginf()  # if fewer than k are not masked; infinity times zero would be NaN in the gradient
    return (values.masked_fill(masked, 0.0) * scale).masked_fill(masked, -torch.inf).logsumexp(1)


def _lse_heated(similarities: Tensor, bias: Tensor, scale: Tensor, heat: float) -> Tensor:
    """Compute the log-sum-exp of each row, with a temperature per similarity."""
    logits = similarities * scale / (1 - heat * (1 + similarities) / 2)
    return logits.masked_fill(bias.isneginf(), -torch.inf).logsumexp(1)


def _positive_weights(positive: Tensor, sigma: float) -> Tensor:
    """Compute ``2 - B softmax(p / sigma)`` over the positives of all ranks, whose mean is 1, without gradient."""
    gathered = distributed.gather(positive) / sigma
    return 2 - len(gathered) * (positive.detach() / sigma - gathered.logsumexp(0)).exp()


def _corrected(anchors: AnchorBatch, weighting: Negatives) -> Tensor:
    """Compute the logarithm of the reweighted sum over negatives, with the false negatives subtracted."""
    count, positive = anchors.count(), anchors.positive * anchors.scale
    empty = count == 0  # finite here, minus infinity at the end
    log_count = count.clamp_min(1).log()
    negative = anchors.lse(anchors.scale * (1 + weighting.beta) if weighting.kind == "hard" else anchors.scale)
    negative = negative.masked_fill(empty, 0.0)
    if weighting.kind == "hard":
        weights = anchors.lse(anchors.scale * weighting.beta) if weighting.beta > 0 else log_count
        negative = negative - weights.masked_fill(empty, 0.0) + log_count
    # The lower bound of a sum of N exponentials of scaled cosines, to which the difference is clamped as well.
    floor = log_count - anchors.scale
    peak = torch.maximum(torch.maximum(negative, positive + log_count), floor).detach()
    false = weighting.tau_plus * (positive + log_count - peak).exp()
    difference = ((negative - peak).exp() - false) / (1 - weighting.tau_plus)
    tiny = torch.finfo(negative.dtype).tiny  # at low temperatures the floor itself underflows relative to the peak
    raised = torch.maximum(difference.clamp_min(tiny).log() + peak, floor)
    return torch.where(difference > tiny, raised, floor).masked_fill(empty, -torch.inf)
