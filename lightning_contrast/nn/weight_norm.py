"""Linear layer with weight-normalized rows, the last layer of the DINO family's heads."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least
from lightning_contrast.precision import float32_products


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are ``g * v / |v|``: prototypes of a given length.

    Weight normalization (https://arxiv.org/abs/1602.07868) as in DINO's last layer: ``g`` starts at 1 and is frozen
    there unless ``train_scale``. For unit inputs the outputs are cosine similarities times ``g``. They are computed in
    float32, also under autocast, because the losses divide them by temperatures of 0.04 to 0.1, which amplifies the
    rounding of 16-bit numbers. The weight is computed in each forward pass from two ordinary parameters, ``weight_g``
    (N, 1) and ``weight_v`` (N, D), named as in the reference implementations' checkpoints, so deepcopy, pickle, moving
    averages, parameter groups and sharding need no special case. ``weight_v`` is initialized as the weight of
    `torch.nn.Linear`.

    Source: https://github.com/facebookresearch/dino (``torch.nn.utils.weight_norm``, which cannot be deep-copied).
    Differs from it: under autocast the reference implementation computes the outputs in half precision.

    Args:
        in_dim: Width D of the input, >= 1.
        out_dim: Number N of outputs, >= 1.
        train_scale: Whether to train ``g`` as well.

    Raises:
        TypeError: If a width is not an integer.
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
        """Set ``weight_g`` to 1 and initialize ``weight_v`` as `torch.nn.Linear` does."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The normalized weight, ``(N, D)``, in float32 or more, with its gradient."""
        rows = self.weight_v.to(torch.promote_types(self.weight_v.dtype, torch.float32))
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        weight: Tensor = rows * (self.weight_g / length)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs ``(..., N)`` of inputs ``(..., D)``, in float32 or more."""
        with float32_products(x.device.type):
            weight = self.weight
            return F.linear(x.to(weight.dtype), weight)

    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        return f"in_dim={self.in_dim}, out_dim={self.out_dim}, train_scale={self.weight_g.requires_grad}"
