"""EMA of a teacher's logits, updated once per optimizer step."""

import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_probability, fail


class Center(nn.Module):
    """Exponential moving average of the mean teacher logits of an optimizer step: DINO's center.

    Eq. 4 of DINO (https://arxiv.org/abs/2104.14294): ``c <- m * c + (1 - m) * mean``, from zero, with the mean over the
    rows of all ranks and all micro-batches of the step. It is a step state: calling it only accumulates the logits on
    their device; `MomentumUpdate` calls `commit` after an optimizer step and `discard` after a skipped one. Return it
    from ``step_states()``. There is no device synchronization. The center is float32 for logits of any dtype, part of
    the checkpoint, and the same on every rank.

    Source: https://github.com/facebookresearch/dino (``DINOLoss.update_center``).
    Differs from it: under gradient accumulation it is updated once per optimizer step with the mean of all
    micro-batches, not per micro-batch; a step whose mean is not finite does not change it.

    Args:
        dim: Number K of logits, >= 1.
        momentum: EMA momentum, in [0, 1]; 0.9 in the paper.

    Raises:
        TypeError: If ``dim`` is not a whole number.
        ValueError: If a value is out of its range.

    Example:
        >>> center = Center(2)
        >>> _ = center(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        >>> center.commit()
        >>> center.value
        tensor([0.2000, 0.1000])
    """

    bits: Tensor

    def __init__(self, dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_probability("momentum", momentum)
        self.dim, self.momentum = dim, momentum
        # Strategies cast floating buffers but not integers, so the floats are kept as integers of equal bits.
        self.register_buffer("bits", torch.zeros(dim, dtype=torch.int32))
        # Not buffers: DDP would overwrite them with rank 0's, and a checkpoint does not need a partial accumulation.
        self._sum: Tensor | None = None
        self._count = 0

    @property
    def value(self) -> Tensor:
        """Return a copy of the center as of the last commit, (K,) float32, without gradient."""
        return self.bits.view(torch.float32).clone()

    @torch.no_grad()
    def forward(self, logits: Tensor) -> Tensor:
        """Accumulate logits for the next commit.

        Args:
            logits: Raw teacher logits of this micro-batch, ``(..., K)``; all rows have equal weight.

        Returns:
            The center as of the last commit, ``(K,)`` float32.

        Raises:
            ValueError: If the last dimension is not K.
        """
        if logits.ndim < 2 or logits.shape[-1] != self.dim:
            fail("logits", f"have shape (..., {self.dim})", tuple(logits.shape), "Give one number for each prototype")
        rows = logits.detach().flatten(0, -2)
        total = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(rows)
        return self.value

    @torch.no_grad()
    def commit(self) -> None:
        """Update the center with the mean of the logits accumulated on all ranks; every rank must call it."""
        if self._sum is None:
            if not distributed.is_distributed():
                return
            self._sum = torch.zeros(self.dim, device=self.bits.device)
        count = torch.full_like(self._sum[:1], self._count)  # created on the device, without synchronization
        joined = distributed.all_reduce_sum(torch.cat([self._sum, count]))
        total, rows = joined[:-1], joined[-1]
        old = self.value
        moved = (old.to(total) * self.momentum + total / rows * (1 - self.momentum)).float()
        self.bits.copy_(torch.where(moved.isfinite().all(), moved, old).view(torch.int32))
        self.discard()

    def discard(self) -> None:
        """Discard what was accumulated since the last commit."""
        self._sum, self._count = None, 0

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"dim={self.dim}, momentum={self.momentum}"
