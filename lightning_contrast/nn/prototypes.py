"""Learned directions that embeddings are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least

_SHORTEST = 1e-12  # a row of zeros stays one


class Prototypes(nn.Module):
    """K directions and the scores of embeddings for them: a linear layer without bias, its rows of length 1.

    The prototypes of SwAV (https://arxiv.org/abs/2006.09882; official program: facebookresearch/swav). Scores are
    cosine similarities where the embeddings have length 1. They are computed in float32, also under autocast, because
    they are divided by temperatures of 0.05 and less.

    The gradient is that of the scores for rows of length 1, not projected, as in the program, which sets the rows to
    that length before each forward pass: call `normalize` there. Rows of another length give the same scores.
    ``requires_grad_(False)`` freezes them for good; `drop_gradient` for the step at hand.

    Args:
        dim: Width D of an embedding, >= 1.
        count: Number K of prototypes, >= 2.

    Raises:
        TypeError: If ``dim`` or ``count`` is not a whole number.
        ValueError: If there are fewer than 2 prototypes, or ``dim`` is below 1.

    Example:
        >>> prototypes = Prototypes(dim=8, count=5)
        >>> prototypes(torch.randn(3, 8)).shape
        torch.Size([3, 5])
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("prototypes", count, 2, "Give at least 2: with one prototype all samples are the same")
        self.dim, self.count = dim, count
        self.weight = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())
        self.normalize()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the scores (B, K) of embeddings (B, D), in float32 or more."""
        dtype = torch.promote_types(torch.promote_types(embeddings.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            rows = self.weight.to(dtype)
            return F.linear(embeddings.to(dtype), rows / _lengths(rows))

    @torch.no_grad()
    def normalize(self) -> None:
        """Set each row to length 1 in place; rows are never split between ranks, so a shard needs no other."""
        self.weight.div_(_lengths(self.weight))

    def drop_gradient(self) -> None:
        """Forget the gradient, so that the coming optimizer step passes over the prototypes.

        A gradient of None and not of zero: weight decay and momentum pass over them too.
        """
        self.weight.grad = None

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"dim={self.dim}, count={self.count}"


def _lengths(rows: Tensor) -> Tensor:
    """Return the lengths (K, 1) of rows (K, D), without gradient."""
    lengths: Tensor = torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True)
    return lengths.clamp_min(_SHORTEST)
