"""Averages that move once per optimizer step: the center of a teacher's logits, and TiCo's second moment."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_probability, fail
from lightning_contrast.precision import full_precision, normalize


class StepAverage(nn.Module):
    """Exponential moving average, from zero, of the mean of something over the rows of an optimizer step.

    It is a step state: `add` only accumulates sums on their device; `MomentumUpdate` calls `commit` after an optimizer
    step and `discard` after a skipped one. Return it from ``step_states()``. There is no device synchronization. The
    average is float32, part of the checkpoint, and the same on every rank; a step whose mean is not finite does not
    change it.

    Args:
        shape: Shape of the average.
        momentum: EMA momentum, in [0, 1].
        size_name: Name of the argument of the module that sets the shape, for errors.

    Raises:
        ValueError: If a value is out of its range; at loading, if the checkpoint has an average of another shape.
    """

    bits: Tensor

    def __init__(self, shape: tuple[int, ...], momentum: float, size_name: str) -> None:
        super().__init__()
        check_probability("momentum", momentum)
        self.momentum, self._size_name = momentum, size_name
        # Strategies cast floating buffers but not integers, so the floats are kept as integers of equal bits.
        self.register_buffer("bits", torch.zeros(shape, dtype=torch.int32))
        # Not buffers: DDP would overwrite them with rank 0's, and a checkpoint does not need a partial accumulation.
        self._sum: Tensor | None = None
        self._count = 0

    @property
    def value(self) -> Tensor:
        """Return a copy of the average as of the last commit, (*shape) float32, without gradient."""
        return self.bits.view(torch.float32).clone()

    @torch.no_grad()
    def add(self, total: Tensor, count: int) -> None:
        """Accumulate a sum for the next commit.

        Args:
            total: Sum over the rows of this micro-batch, ``(*shape)``.
            count: Number of rows.
        """
        self._sum = total if self._sum is None else self._sum + total
        self._count += count

    @torch.no_grad()
    def commit(self) -> None:
        """Update the average with the mean of what was accumulated on all ranks; every rank must call it."""
        if self._sum is None:
            if not distributed.is_distributed():
                return
            self._sum = torch.zeros(self.bits.shape, device=self.bits.device)
        flat = self._sum.flatten()
        count = torch.full_like(flat[:1], self._count)  # created on the device, without synchronization
        joined = distributed.all_reduce_sum(torch.cat([flat, count]))
        total, rows = joined[:-1].view(self.bits.shape), joined[-1]
        old = self.value
        moved = (old.to(total) * self.momentum + total / rows * (1 - self.momentum)).float()
        self.bits.copy_(torch.where(moved.isfinite().all(), moved, old).view(torch.int32))
        self.discard()

    def discard(self) -> None:
        """Discard what was accumulated since the last commit."""
        self._sum, self._count = None, 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse an average of another shape by the name of the argument that sets it."""
        saved = state_dict.get(prefix + "bits")
        if saved is not None and saved.shape != self.bits.shape:
            rule = f"be {saved.shape[-1]} as in the checkpoint, whose `{prefix.rstrip('.')}` has that width"
            fail(self._size_name, rule, self.bits.shape[-1], "Resume with that number, or start a new run")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Center(StepAverage):
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

    def __init__(self, dim: int, momentum: float = 0.9) -> None:
        check_at_least("dim", dim, 1)
        super().__init__((dim,), momentum, "num_prototypes")
        self.dim = dim

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
        self.add(rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)), len(rows))
        return self.value

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"dim={self.dim}, momentum={self.momentum}"


class SecondMoment(StepAverage):
    """Exponential moving average of the second moment of unit rows, ``mean(q q')``: the covariance of TiCo.

    ``C <- m * C + (1 - m) * mean`` (https://arxiv.org/abs/2206.10698), with the mean over the rows of all ranks and all
    micro-batches of an optimizer step; see `StepAverage`.

    Args:
        dim: Width D of the rows, >= 1; the ``projection_dim`` of a method.
        momentum: EMA momentum, in [0, 1]; 0.9 in the paper.

    Raises:
        TypeError: If ``dim`` is not a whole number.
        ValueError: If a value is out of its range; at loading, if the checkpoint has another width.

    Example:
        >>> moment = SecondMoment(2)
        >>> _ = moment(torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
        >>> moment.commit()
        >>> moment.value
        tensor([[0.0500, 0.0000],
                [0.0000, 0.0500]])
    """

    def __init__(self, dim: int, momentum: float = 0.9) -> None:
        check_at_least("dim", dim, 1)
        super().__init__((dim, dim), momentum, "projection_dim")
        self.dim = dim

    def forward(self, rows: Tensor) -> Tensor:
        """Accumulate rows for the next commit.

        Args:
            rows: Embeddings of this micro-batch, ``(B, D)``; normalized here, in float32 or float64.

        Returns:
            The average as of the last commit, ``(D, D)`` float32.

        Raises:
            ValueError: If the width is not D.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            fail("rows", f"have shape (rows, {self.dim})", tuple(rows.shape), "Give the projections of one view")
        self.add(_outer_products(rows.detach()), len(rows))
        return self.value

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"dim={self.dim}, momentum={self.momentum}"


@full_precision
def _outer_products(rows: Tensor) -> Tensor:
    """Return the sum of the outer products of normalized rows (B, D), (D, D)."""
    unit = normalize(rows)
    return unit.T @ unit
