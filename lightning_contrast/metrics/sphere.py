"""Alignment and uniformity on the unit sphere as metrics; the losses of these names are `losses.alignment` and so on.

Source: https://arxiv.org/abs/2005.10242.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_positive, check_same_shape, require
from lightning_contrast.metrics.neighbours import check_features

ROWS = 2048
_PRIME = 1_000_000_007


class Alignment(Metric):
    """Mean distance of positive pairs on the unit sphere to the power ``alpha``: 0 where views agree, at most 2^alpha.

    Memory is bounded: a sum and a count. All ranks' pairs count.

    Args:
        alpha: Power of the distance, > 0; 2 in the paper.
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = Alignment()
        >>> metric.update(torch.eye(3), torch.eye(3)[[0, 2, 1]])
        >>> round(metric.compute().item(), 4)
        1.3333
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    pairs: Tensor

    def __init__(self, alpha: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("alpha", alpha, "The paper takes 2")
        self.alpha = alpha
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, view_a: Tensor, view_b: Tensor) -> None:
        """Add pairs.

        Args:
            view_a: Embeddings of one view, ``(B, D)``, floating; L2-normalised here.
            view_b: Embeddings of the other view of the same images, ``(B, D)``.

        Raises:
            ValueError: If the shapes differ or are not 2-D.
        """
        check_same_shape("view_a", view_a, "view_b", view_b, dims=2)
        check_features("view_a", view_a)
        difference = F.normalize(view_a.detach().double(), dim=1) - F.normalize(view_b.detach().double(), dim=1)
        self.total += difference.norm(dim=1).pow(self.alpha).sum()
        self.pairs += len(difference)

    def compute(self) -> Tensor:
        """Return the alignment, a float64 scalar in [0, 2^alpha].

        Raises:
            ValueError: If there are no pairs.
        """
        require(int(self.pairs) > 0, "Alignment", "have pairs", 0, "Call `update` before `compute`")
        return self.total / self.pairs


class Uniformity(Metric):
    """Logarithm of the mean Gaussian potential exp(-t d^2) over pairs of embeddings on the unit sphere.

    0 where all are equal; lower is more uniform: random directions in 128 dimensions have -3.94, the limit in many
    dimensions is -2 t.

    Memory is bounded by a sample: while there were at most ``max_samples`` rows, all of their pairs count and the value
    is exact; of more, each row has the same chance to be among those kept, whose pairs then count. The sample is drawn
    by a generator of its own that depends on ``seed``, the rank and the number of rows so far. Every rank keeps that
    many and the value is that of the same number out of all ranks' rows.

    Args:
        t: Sharpness of the potential, > 0; 2 in the paper.
        max_samples: Rows kept on each rank, >= 2.
        seed: Of the sample.
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = Uniformity()
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> round(metric.compute().item(), 4)  # one pair at a squared distance of 2
        -4.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    kept: list[Tensor]
    order: list[Tensor]

    def __init__(self, t: float = 2.0, max_samples: int = 4096, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("t", t, "The paper takes 2")
        check_at_least("max_samples", max_samples, 2)
        self.t, self.max_samples, self.seed = t, max_samples, seed
        self.add_state("kept", default=[], dist_reduce_fx="cat")
        self.add_state("order", default=[], dist_reduce_fx="cat")
        self._seen = 0

    def update(self, features: Tensor) -> None:
        """Add embeddings.

        Args:
            features: ``(B, D)``, floating; L2-normalised here.

        Raises:
            ValueError: If they are not floating and 2-D.
        """
        check_features("features", features)
        key = ((self.seed * _PRIME + distributed.rank()) * _PRIME + self._seen) % 2**63
        generator = torch.Generator().manual_seed(key)
        order = torch.rand(len(features), generator=generator, dtype=torch.float64).to(features.device)
        self._seen += len(features)
        self.kept.append(F.normalize(features.detach().float(), dim=1))
        self.order.append(order)
        if sum(len(part) for part in self.kept) >= 2 * self.max_samples:
            kept, order = self._lowest()
            self.kept, self.order = [kept], [order]

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self._seen = 0

    def compute(self) -> Tensor:
        """Return the uniformity, a float64 scalar in [-4 t, 0].

        Raises:
            ValueError: If there are fewer than two rows.
        """
        rows = sum(len(part) for part in self.kept)
        require(rows >= 2, "Uniformity", "have at least 2 rows", rows, "Call `update` before `compute`")
        return uniformity_of(self._lowest()[0], self.t)

    def _lowest(self) -> tuple[Tensor, Tensor]:
        """Return the rows whose random numbers are lowest: each row has the same chance, on whatever rank it was."""
        kept, order = dim_zero_cat(self.kept), dim_zero_cat(self.order)
        if len(kept) <= self.max_samples:
            return kept, order
        lowest = order.topk(self.max_samples, largest=False).indices
        return kept[lowest], order[lowest]


def uniformity_of(unit: Tensor, t: float = 2.0) -> Tensor:
    """Return the uniformity of unit vectors on this rank, in chunks of rows.

    Args:
        unit: ``(N, D)``, of length 1, N >= 2.
        t: Sharpness of the potential, > 0.

    Returns:
        A float64 scalar in [-4 t, 0].
    """
    parts = []
    for start in range(0, len(unit), ROWS):
        potential = 2 * t * (unit[start : start + ROWS] @ unit.T).double() - 2 * t  # -t d^2, since d^2 = 2 - 2 cos
        potential.diagonal(offset=start).fill_(float("-inf"))
        parts.append(potential.logsumexp(dim=(0, 1)))
    pairs = len(unit) * (len(unit) - 1)
    return torch.stack(parts).logsumexp(dim=0) - torch.tensor(float(pairs), dtype=torch.float64).log()
