"""A causal context of the frames of a clip, and linear predictions of the frames that follow."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, require


class TimePredictor(nn.Module):
    """GRU over frame features, and one matrix for each step ahead, as CPC v1 has them for sound.

    Paper: https://arxiv.org/abs/1807.03748, section 2.2. The context of a frame depends on it and on earlier frames.

    Args:
        in_dim: F, the width of the frame features, >= 1.
        context_dim: A, the width of the context, >= 1; 256 in the paper.
        steps: K, how many steps ahead are predicted, >= 1; 12 in the paper.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a size is below 1.

    Example:
        >>> context, matrices = TimePredictor(5, 4, 3)(torch.zeros(2, 7, 5))
        >>> context.shape, matrices.shape
        (torch.Size([2, 7, 4]), torch.Size([3, 5, 4]))
    """

    def __init__(self, in_dim: int, context_dim: int = 256, steps: int = 12) -> None:
        super().__init__()
        for name, value in (("in_dim", in_dim), ("context_dim", context_dim), ("steps", steps)):
            check_at_least(name, value, 1)
        self.gru = nn.GRU(in_dim, context_dim, batch_first=True)
        self.steps = nn.ModuleList(nn.Linear(context_dim, in_dim, bias=False) for _ in range(steps))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the contexts (B, T, A) of frame features (B, T, F), and the matrices (K, F, A) that predict.

        The GRU computes in the precision of its weights, also under autocast. It is written out, since a clip has few
        frames, and fused kernels exist for some devices only.
        """
        hint = "Stack the features of the frames of each clip"
        require(frames.ndim == 3, "frames", "have the shape (B, T, F)", tuple(frames.shape), hint)
        gru: Any = self.gru
        with torch.autocast(frames.device.type, enabled=False):
            inputs = F.linear(frames.to(gru.weight_ih_l0.dtype), gru.weight_ih_l0, gru.bias_ih_l0)  # (B, T, 3 A)
            state = torch.zeros_like(inputs[:, 0, : gru.hidden_size])  # (B, A)
            states = []
            for of_input in inputs.unbind(1):
                reset, update, new = of_input.chunk(3, 1)
                of_reset, of_update, of_new = F.linear(state, gru.weight_hh_l0, gru.bias_hh_l0).chunk(3, 1)
                candidate = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
                state = candidate + torch.sigmoid(update + of_update) * (state - candidate)
                states.append(state)
        return torch.stack(states, 1), torch.stack([cast("Tensor", step.weight) for step in self.steps])
