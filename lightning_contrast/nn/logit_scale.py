"""Learned parameters of logits: the scale and bias of CLIP and SigLIP, and CURL's matrix."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_interval, check_positive


class LogitScale(nn.Module):
    """The learned multiplier of the cosine similarities, as in CLIP.

    Stored as its logarithm, a parameter of shape (1,); a call returns the multiplier, (1,).
    `optim.parameter_groups` puts the logarithm into a group of its own, without weight decay and trust ratio, with the
    learning rate of the other parameters. `optim.build_optimizer` clamps it to [0, ln maximum] after every step, as
    OpenCLIP does.

    Args:
        init: Multiplier at the start, > 0; CLIP has 1 / 0.07 and SigLIP 10.
        maximum: Upper bound of the multiplier; the lower one is 1. None: not clamped, as SigLIP's authors have it.

    Raises:
        ValueError: If ``init`` is not above 0, or lies outside [1, maximum].

    Example:
        >>> round(LogitScale(10.0)().item(), 4)
        10.0
    """

    def __init__(self, init: float = 1 / 0.07, maximum: float | None = 100.0) -> None:
        super().__init__()
        check_positive("logit_scale", init, "Give the multiplier itself, not its logarithm")
        if maximum is not None:
            hint = "Move the bound or the start, or set `max_logit_scale=None`"
            check_positive("max_logit_scale", maximum, hint)
            check_interval("logit_scale", init, f"[1, {maximum}]", hint)
        self.maximum = maximum
        self.log_scale = nn.Parameter(torch.full((1,), math.log(init)))

    @property
    def group_options(self) -> dict[str, Any]:
        """Options of the parameter's group in the optimizer: its bounds."""
        return {} if self.maximum is None else {"bounds": (0.0, math.log(self.maximum))}

    def forward(self) -> Tensor:
        """Return the multiplier, (1,)."""
        return self.log_scale.exp()


class LogitBias(nn.Module):
    """The learned bias of the logits of a sigmoid loss, as in SigLIP (https://arxiv.org/abs/2303.15343).

    A parameter of shape (1,). `optim.parameter_groups` puts it into a group of its own, without weight decay and trust
    ratio.

    Args:
        init: Bias at the start; the paper has -10, which makes all pairs improbable.
        lr: Peak learning rate, > 0, which does not scale with the global batch. None is that of the other parameters.

    Example:
        >>> LogitBias(-10.0)().tolist()
        [-10.0]
    """

    def __init__(self, init: float = -10.0, lr: float | None = None) -> None:
        super().__init__()
        if lr is not None:
            check_positive("lr", lr)
        self.lr = lr
        self.bias = nn.Parameter(torch.full((1,), float(init)))

    @property
    def group_options(self) -> dict[str, Any]:
        """Options of the parameter's group in the optimizer: its learning rate."""
        return {} if self.lr is None else {"lr": self.lr}

    def forward(self) -> Tensor:
        """Return the bias, (1,)."""
        return self.bias.clone()  # a sharded parameter is freed after the call


class BilinearWeight(nn.Module):
    """The matrix W of CURL's similarity ``q W k`` (https://arxiv.org/abs/2004.04136), drawn uniformly from [0, 1).

    Args:
        dim: D, the width of the embeddings.

    Example:
        >>> BilinearWeight(8)().shape
        torch.Size([8, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim, dim))

    def forward(self) -> Tensor:
        """Return the matrix, (D, D)."""
        return self.weight.clone()  # a sharded parameter is freed after the call
