"""Linear layer with weight-normalized rows, the last layer of the DINO family's heads."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are ``g * v / |v|``: prototypes of a fixed or trained length.

    Weight normalization (https://arxiv.org/abs/1602.07868) as in DINO's last layer: ``g`` starts at 1 and is frozen
    there unless ``train_scale``. With inputs of length 1 the outputs are cosine similarities, times ``g``. The weight
    is computed in each forward pass from two ordinary parameters, ``weight_g`` (N, 1) and ``weight_v`` (N, D), named as
    in the authors' checkpoints, so deepcopy, pickle, EMA, parameter groups and sharding work as usual.
    ``weight_v`` starts as the weight of `torch.nn.Linear`.

    Source: https://github.com/facebookresearch/dino (``torch.nn.utils.weight_norm``, which cannot be deep-copied).
    Differs from it: lengths are computed in float32 for half-precision weights.

    Args:
        in_dim: Width D of the input, >= 1.
        out_dim: Number N of outputs, >= 1.
        train_scale: Train ``g`` too.

    Raises:
        TypeError: If a width is not a whole number.
        ValueError: If a width is below 1.
    """

    def __init__(self, in_dim: int, out_dim: int, *, train_scale: bool = False) -> None:
        super().__init__()
        check_at_least("in_dim", in_dim, 1)
        check_at_least("out_dim", out_dim, 1)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.weight_g = nn.Parameter(torch.empty(out_dim, 1), requires_grad=train_scale)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set ``weight_g`` to 1 and draw ``weight_v`` as `torch.nn.Linear` does."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """Return the normalized weight, ``(N, D)``, with its gradient."""
        wide = torch.promote_types(self.weight_v.dtype, torch.float32)
        length = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True, dtype=wide)
        weight: Tensor = self.weight_v * (self.weight_g / length).to(self.weight_v.dtype)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``(..., N)`` of inputs ``(..., D)``."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"in_dim={self.in_dim}, out_dim={self.out_dim}, train_scale={self.weight_g.requires_grad}"
