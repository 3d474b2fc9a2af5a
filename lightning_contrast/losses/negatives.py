"""How the negatives of an anchor enter its loss: one interface for NT-Xent, InfoNCE with a queue, and CLIP.

With the cosine similarity ``p`` of an anchor to its positive, ``n`` to its negatives, N of them, and temperature T:

- ``"uniform"``: every negative counts once, ``log(e^(p/T) + sum e^(n/T)) - p/T``.
- ``"debiased"``: the share ``tau_plus`` of false negatives is taken off the sum (https://arxiv.org/abs/2007.00224).
- ``"hard"``: debiased, and each negative weighs ``e^(beta n/T)`` (https://arxiv.org/abs/2010.04592).
- ``"decoupled"``: the positive leaves the denominator, ``log sum e^(n/T) - p/T`` (https://arxiv.org/abs/2110.06848).
- ``"decoupled_weighted"``: the same with less weight for positives that are close already (width ``sigma``).
- ``"top_k"``: only the ``k`` most similar negatives count, then as uniform.
- ``"heated"``: each negative has the temperature ``T (1 - heat (1 + n)/2)``, which falls from T for the opposite
  direction to ``T (1 - heat)`` for the same one. It is kin to ``"hard"``, which for all negatives alike uses the
  temperature ``T/(1 + beta)`` and then divides by the mean weight, so that the size of the sum stays: heated sharpens
  the similar negatives only, keeps the order of similarities for every ``heat``, and lets the sum grow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_choice, check_not_negative, check_positive, require
from lightning_contrast.losses.checks import Scalar
from lightning_contrast.losses.kernels.logsumexp import NegativeMask, rows_lse, self_lse
from lightning_contrast.losses.kernels.per_row import per_row

KINDS = ("uniform", "debiased", "hard", "decoupled", "decoupled_weighted", "top_k", "heated")


@dataclass(frozen=True)
class Negatives:
    """A way to treat negatives, and its numbers; see the module for the formulas.

    Args:
        kind: ``"uniform"``, ``"debiased"``, ``"hard"``, ``"decoupled"``, ``"decoupled_weighted"``, ``"top_k"`` or
            ``"heated"``.
        tau_plus: Share of false negatives, about 1 / number of classes, in [0, 1); for debiased and hard.
        beta: Concentration on hard negatives, >= 0; 0 is debiased; for hard.
        sigma: Width of the weighting of positives in cosine units, > 0; for decoupled_weighted.
        k: Number of negatives that count, >= 1; for top_k.
        heat: How far the temperature of the most similar negative falls, in [0, 1); 0 is uniform; for heated.

    Raises:
        ValueError: If the kind is unknown or a number is out of its range.
    """

    kind: str = "uniform"
    tau_plus: float = 0.1
    beta: float = 1.0
    sigma: float = 0.5
    k: int = 64
    heat: float = 0.5

    def __post_init__(self) -> None:
        check_choice("negatives", self.kind, KINDS)
        check_share("tau_plus", self.tau_plus, "Give about 1 / number of classes")
        check_not_negative("beta", self.beta)
        check_positive("sigma", self.sigma)
        check_at_least("k", self.k, 1)
        check_share("heat", self.heat, "Give 0 for one temperature for all")

    @property
    def is_uniform(self) -> bool:
        """Tell whether every negative counts once and the positive is in the denominator."""
        return self.kind == "uniform"


def check_share(name: str, value: float, hint: str) -> None:
    """Check ``0 <= value < 1``."""
    require(0 <= value < 1, name, "lie in [0, 1)", value, hint)


def as_negatives(weighting: Negatives | str | Mapping[str, Any]) -> Negatives:
    """Return the handling that a name with default numbers, a handling or the dict of its fields stands for."""
    if isinstance(weighting, Mapping):  # as a checkpoint keeps it
        return Negatives(**weighting)
    return weighting if isinstance(weighting, Negatives) else Negatives(weighting)


@dataclass(frozen=True)
class AnchorBatch:
    """The anchors of this rank and the negatives that they meet.

    Args:
        x: Unit rows, ``(N, D)``.
        y: Unit columns, ``(M, D)``.
        positive: Cosine similarity of each anchor to its positive, ``(N,)``.
        scale: 1 / temperature.
        columns: What is left out; the positive must be.
        views: True: ``y`` is ``x``, the two views of N / 2 images.
        together: True: ``y`` is this rank's share of the columns. False: every rank holds all the columns.
    """

    x: Tensor
    y: Tensor
    positive: Tensor
    scale: Scalar
    columns: NegativeMask
    views: bool = False
    together: bool = True

    def lse(self, scale: Scalar) -> Tensor:
        """Return the log-sum-exp of the scaled similarities to the negatives, ``(N,)``."""
        if self.views:
            return self_lse(self.x, scale, self.columns)
        return rows_lse(self.x, self.y, scale, self.columns, together=self.together)

    def per_row(self, function: Callable[..., Tensor]) -> Tensor:
        """Return ``function(similarities, bias, scale)`` of each anchor, ``(N,)``."""
        scale = self.scale if isinstance(self.scale, Tensor) else self.x.new_tensor(self.scale)
        return per_row(function, self.x, self.y, self.columns, scale, views=self.views, together=self.together)

    def count(self) -> Tensor:
        """Return the number of negatives of each anchor, ``(N,)``."""
        shared = self.together and distributed.is_distributed()
        weights = self.x.new_ones(len(self.y)) if self.columns.mask is None else self.columns.mask.to(self.x.dtype)
        total = distributed.all_reduce_sum(weights.sum()) if shared else weights.sum()
        groups = self.columns.groups
        if groups is None:
            left_out = (1 + int(self.views)) if self.columns.skip_partner else int(self.views)
            return (total - left_out).expand(len(self.x))
        theirs = groups if self.columns.column_groups is None else self.columns.column_groups
        if shared:
            theirs, weights = distributed.gather(theirs), distributed.gather(weights)
        ordered, order = theirs.sort()
        below = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])
        same = below[torch.searchsorted(ordered, groups, right=True)] - below[torch.searchsorted(ordered, groups)]
        return total - same


def anchor_losses(field: AnchorBatch, weighting: Negatives) -> Tensor:
    """Return the loss of each anchor.

    Args:
        field: Anchors, positives and negatives.
        weighting: How the negatives count.

    Returns:
        ``(N,)`` in nats.
    """
    positive = field.positive * field.scale
    if weighting.kind in ("decoupled", "decoupled_weighted"):
        negative = field.lse(field.scale)
        if weighting.kind == "decoupled_weighted":
            positive = _positive_weights(field.positive, weighting.sigma) * positive
        # An anchor without negatives, as before the first keys are in a queue, has nothing to be told from.
        return torch.where(negative.isneginf(), 0.0, negative - positive)
    if weighting.kind in ("debiased", "hard"):
        negative = _corrected(field, positive, weighting)
    elif weighting.kind == "top_k":
        negative = field.per_row(lambda s, bias, scale: _lse_of_top(s + bias, scale, weighting.k))
    elif weighting.kind == "heated":
        negative = field.per_row(lambda s, bias, scale: _lse_heated(s, bias, scale, weighting.heat))
    else:
        negative = field.lse(field.scale)
    return torch.logaddexp(positive, negative) - positive


def _lse_of_top(similarities: Tensor, scale: Tensor, k: int) -> Tensor:
    """Return the log-sum-exp of the ``k`` largest of each row."""
    values = similarities.topk(min(k, similarities.shape[1]), dim=1).values
    left_out = values.isneginf()  # fewer than k are left; infinity times zero would be a NaN in the gradient
    return (values.masked_fill(left_out, 0.0) * scale).masked_fill(left_out, -torch.inf).logsumexp(1)


def _lse_heated(similarities: Tensor, bias: Tensor, scale: Tensor, heat: float) -> Tensor:
    """Return the log-sum-exp of each row, each similarity divided by a temperature of its own."""
    logits = similarities * scale / (1 - heat * (1 + similarities) / 2)
    return logits.masked_fill(bias.isneginf(), -torch.inf).logsumexp(1)


def _positive_weights(positive: Tensor, sigma: float) -> Tensor:
    """Return ``2 - B softmax(p / sigma)`` over the positives of all ranks, whose mean is 1, without gradient."""
    everyone = distributed.gather(positive) / sigma
    return 2 - len(everyone) * (positive.detach() / sigma - everyone.logsumexp(0)).exp()


def _corrected(field: AnchorBatch, positive: Tensor, weighting: Negatives) -> Tensor:
    """Return the logarithm of the sum over negatives, reweighted and with the false negatives taken off."""
    count = field.count()
    empty = count == 0  # such an anchor gets finite numbers here and minus infinity at the end
    log_count = count.clamp_min(1).log()
    negative = field.lse(field.scale * (1 + weighting.beta) if weighting.kind == "hard" else field.scale)
    negative = negative.masked_fill(empty, 0.0)
    if weighting.kind == "hard":
        weights = field.lse(field.scale * weighting.beta) if weighting.beta > 0 else log_count
        negative = negative - weights.masked_fill(empty, 0.0) + log_count
    # A sum of N exponentials of cosines over a temperature is never below this, so the difference must not be either.
    floor = log_count - field.scale
    peak = torch.maximum(torch.maximum(negative, positive + log_count), floor).detach()
    false = weighting.tau_plus * (positive + log_count - peak).exp()
    difference = ((negative - peak).exp() - false) / (1 - weighting.tau_plus)
    least = (floor - peak).exp().clamp_min(torch.finfo(negative.dtype).tiny)
    return (torch.maximum(difference, least).log() + peak).masked_fill(empty, -torch.inf)
