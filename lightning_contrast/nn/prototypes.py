"""Learned prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least

_SHORTEST = 1e-12  # keeps a row of zeros unchanged


class Prototypes(nn.Module):
    """Scores of embeddings for K prototypes: a linear layer without bias and with unit-length rows.

    The prototypes of SwAV (https://arxiv.org/abs/2006.09882; reference implementation:
    facebookresearch/swav). Scores are cosine similarities if the embeddings have unit length. They are computed in
    float32, also under autocast, because they are divided by temperatures of 0.05 and less.

    As in the reference implementation, the gradient is that of the scores for unit-length rows, without projection;
    call `normalize` before each forward pass. Rows of another length give the same scores. ``requires_grad_(False)``
    freezes them; `drop_gradient` freezes them for one step.

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
        check_at_least("prototypes", count, 2, "Give at least 2: with one prototype all assignments are equal")
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
        """Normalize each row in place; rows are never split between ranks, so this needs no communication."""
        self.weight.div_(_lengths(self.weight))

    def drop_gradient(self) -> None:
        """Set the gradient to None, so that the next optimizer step skips the prototypes.

        Unlike a gradient of zero, this also skips weight decay and momentum.
        """
        self.weight.grad = None

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"dim={self.dim}, count={self.count}"


def _lengths(rows: Tensor) -> Tensor:
    """Return the lengths (K, 1) of rows (K, D), without gradient."""
    lengths: Tensor = torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True)
    return lengths.clamp_min(_SHORTEST)
