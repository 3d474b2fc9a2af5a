"""The learned bias of a sigmoid loss."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_positive


class LogitBias(nn.Module):
    """A number added to all logits, trained with the network, as in SigLIP (https://arxiv.org/abs/2303.15343).

    A parameter of shape (1,). `optim.parameter_groups` puts it into a group of its own, without weight decay and trust
    ratio, with the learning rate ``lr``.

    Args:
        init: Bias at the start, unitless; -10 in the paper, so that the many pairs that do not match start right.
        lr: Peak learning rate, > 0; it follows the schedule of the run, but not the global batch.

    Example:
        >>> LogitBias(-10.0)().tolist()
        [-10.0]
    """

    def __init__(self, init: float = -10.0, lr: float = 1e-3) -> None:
        super().__init__()
        check_positive("lr", lr)
        self.init, self.lr = init, lr
        self.bias = nn.Parameter(torch.full((1,), float(init)))

    @property
    def group_options(self) -> dict[str, Any]:
        """Options of the parameter's group in the optimizer: its learning rate."""
        return {"lr": self.lr}

    def forward(self) -> Tensor:
        """Return the bias, (1,)."""
        return self.bias * 1.0  # a new tensor: FSDP2 shards the parameter again after the pass

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"init={self.init}, lr={self.lr}"
