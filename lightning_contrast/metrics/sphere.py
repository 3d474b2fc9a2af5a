"""Alignment and uniformity on the unit sphere as metrics; `losses.alignment` and `losses.uniformity` are the losses.

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
    """Mean distance of positive pairs on the unit sphere to the power ``alpha``: 0 if the views agree, at most 2^alpha.

    Computed over the pairs of all ranks. Memory is bounded: a sum and a count.

    Args:
        alpha: Power of the distance, > 0; 2 in the paper.
        kwargs: Arguments of `torchmetrics.Metric`.

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
        check_positive("alpha", alpha, "The paper uses 2")
        self.alpha = alpha
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, view_a: Tensor, view_b: Tensor) -> None:
        """Update with pairs.

        Args:
            view_a: Embeddings of one view, ``(B, D)``, floating; L2-normalized here.
            view_b: Embeddings of the other view of the same images, ``(B, D)``; L2-normalized here.

        Raises:
            ValueError: If the shapes differ or are not 2-D.
        """
        check_same_shape("view_a", view_a, "view_b", view_b, dims=2)
        check_features("view_a", view_a)
        difference = F.normalize(view_a.detach().double(), dim=1) - F.normalize(view_b.detach().double(), dim=1)
        self.total += difference.norm(dim=1).pow(self.alpha).sum()
        self.pairs += len(difference)

    def compute(self) -> Tensor:
        """Compute the alignment, a float64 scalar in [0, 2^alpha].

        Raises:
            ValueError: If there are no pairs.
        """
        require(int(self.pairs) > 0, "Alignment", "have pairs", 0, "Call `update` before `compute`")
        return self.total / self.pairs


class Uniformity(Metric):
    """Logarithm of the mean Gaussian potential exp(-t d^2) over pairs of embeddings on the unit sphere.

    0 if all embeddings are equal; lower is more uniform: random directions in 128 dimensions have -3.94, the limit for
    many dimensions is -2 t.

    Memory is bounded: up to ``max_samples`` rows the value is exact, over all pairs; of more rows, a uniform sample of
    ``max_samples`` is kept on each rank, and the value is over the pairs of a uniform sample of ``max_samples`` of all
    ranks' rows. The sample depends on ``seed``, the rank and the number of rows so far, and not on the global random
    state.

    Args:
        t: Sharpness of the potential, > 0; 2 in the paper.
        max_samples: Rows kept per rank, >= 2.
        seed: Seed of the sample.
        kwargs: Arguments of `torchmetrics.Metric`.

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
        check_positive("t", t, "The paper uses 2")
        check_at_least("max_samples", max_samples, 2)
        self.t, self.max_samples, self.seed = t, max_samples, seed
        self.add_state("kept", default=[], dist_reduce_fx="cat")
        self.add_state("order", default=[], dist_reduce_fx="cat")
        self._seen = 0

    def update(self, features: Tensor) -> None:
        """Update with embeddings.

        Args:
            features: Embeddings ``(B, D)``, floating; L2-normalized here.

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
        """Reset the metric."""
        super().reset()
        self._seen = 0

    def compute(self) -> Tensor:
        """Compute the uniformity, a float64 scalar in [-4 t, 0].

        Raises:
            ValueError: If there are fewer than two rows.
        """
        rows = sum(len(part) for part in self.kept)
        require(rows >= 2, "Uniformity", "have at least 2 rows", rows, "Call `update` before `compute`")
        return uniformity_of(self._lowest()[0], self.t)

    def _lowest(self) -> tuple[Tensor, Tensor]:
        """Return the rows with the lowest random numbers: a uniform sample over the rows of all ranks."""
        kept, order = dim_zero_cat(self.kept), dim_zero_cat(self.order)
        if len(kept) <= self.max_samples:
            return kept, order
        lowest = order.topk(self.max_samples, largest=False).indices
        return kept[lowest], order[lowest]


def uniformity_of(unit: Tensor, t: float = 2.0) -> Tensor:
    """Compute the uniformity of unit vectors on this rank, in chunks of rows.

    Args:
        unit: Unit rows ``(N, D)``, N >= 2.
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
