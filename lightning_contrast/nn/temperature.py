"""Learned and scheduled temperatures."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_contrast._checks import check_at_least, check_interval, check_positive, fail

Temperature: TypeAlias = float | nn.Module | Callable[[int], float]
"""A number, a module that returns one when it is called without arguments, or a function of the optimizer step."""


class LearnedTemperature(nn.Module):
    """A temperature that is trained with the network, as in CLIP.

    Stored as its logarithm, a parameter of shape (1,) (https://arxiv.org/abs/2103.00020, section 2.5). A call returns
    ``exp(log_temperature)``, shape (1,), clamped to the bounds; a parameter beyond a bound still receives gradients
    that lead back. `optim.parameter_groups` puts the parameter into a group of its own, without weight decay and trust
    ratio, with the learning rate ``lr``: the rates of "sgd" and "lars" are chosen for weights and would move the
    logarithm from bound to bound. `optim.build_optimizer` clamps the parameter after every step.

    CLIP's scale is 1 / temperature, at most 100, and starts at 1 / 0.07.

    Args:
        init: Temperature at the start, in [minimum, maximum].
        minimum: Lower bound, > 0.
        maximum: Upper bound.
        lr: Peak learning rate of the logarithm, > 0; it follows the schedule of the run, but not the global batch. With
            "adamw" it is the largest relative change per step; with "sgd" and "lars" it multiplies the gradient.

    Raises:
        ValueError: If a bound or ``lr`` is not above 0, or ``init`` lies outside the bounds.

    Example:
        >>> round(LearnedTemperature(0.1)().item(), 6)
        0.1
    """

    def __init__(self, init: float = 0.07, minimum: float = 0.01, maximum: float = 1.0, lr: float = 1e-3) -> None:
        super().__init__()
        check_positive("minimum", minimum)
        check_positive("lr", lr)
        check_interval("init", init, f"[{minimum}, {maximum}]", "Move a bound or the start")
        self.init, self.minimum, self.maximum, self.lr = init, minimum, maximum, lr
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(init)))

    @property
    def group_options(self) -> dict[str, Any]:
        """Options of the parameter's group in the optimizer: its learning rate and its bounds."""
        return {"lr": self.lr, "bounds": (math.log(self.minimum), math.log(self.maximum))}

    def forward(self) -> Tensor:
        """Return the temperature, (1,)."""
        low, high = self.group_options["bounds"]
        return cast("Tensor", _Bounded.apply(self.log_temperature, low, high)).exp()

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"init={self.init}, minimum={self.minimum}, maximum={self.maximum}, lr={self.lr}"


class _Bounded(torch.autograd.Function):
    """Clamp with a gradient beyond the bounds if a descent step leads back, which `torch.clamp` does not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        outwards = ((x > high) & (grad < 0)) | ((x < low) & (grad > 0))
        return grad.masked_fill(outwards, 0.0), None, None


@dataclass(frozen=True)
class ScheduledTemperature:
    """A temperature on a cosine between two values, a function of the optimizer step.

    ``end + (start - end) (1 + cos(2 pi cycles k / K)) / 2`` at step k of K: half a cycle falls or rises once, whole
    cycles oscillate between ``start`` and ``end``, as in https://arxiv.org/abs/2303.13664.

    Args:
        start: Temperature at step 0, > 0.
        end: Temperature half a cycle later, > 0.
        steps: Optimizer steps K of the schedule, >= 1; None: those of the run. The temperature is constant
            after them.
        cycles: Cycles in those steps, > 0.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> schedule = ScheduledTemperature(0.5, 0.1, steps=100)
        >>> [round(schedule(step), 6) for step in (0, 50, 100, 101)]
        [0.5, 0.3, 0.1, 0.1]
    """

    start: float
    end: float
    steps: int | None = None
    cycles: float = 0.5

    def __post_init__(self) -> None:
        check_positive("start", self.start)
        check_positive("end", self.end)
        check_positive("cycles", self.cycles)
        if self.steps is not None:
            check_at_least("steps", self.steps, 1)

    def __call__(self, step: float, total_steps: float | None = None) -> float:
        """Return the temperature at an optimizer step.

        Args:
            step: Step, >= 0.
            total_steps: Length of the run in steps, > 0; used if the schedule has no ``steps``.

        Raises:
            ValueError: If neither length is given.
        """
        length = self.steps if self.steps is not None else total_steps
        if length is None:
            fail("steps", "be given outside of a run", None, "Set `steps`, or give `total_steps`")
        check_positive("total_steps", length)
        progress = min(step / length, 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(2 * math.pi * self.cycles * progress)) / 2


def check_temperature(temperature: Temperature | Mapping[str, Any]) -> Temperature:
    """Check a temperature in any of its forms and return it.

    Raises:
        ValueError: If it is a number and not above 0.
        TypeError: If it is no number, module or function.
    """
    if isinstance(temperature, Mapping):  # as stored in a checkpoint
        return ScheduledTemperature(**temperature)
    if isinstance(temperature, int | float) and not isinstance(temperature, bool):
        check_positive("temperature", temperature)
    elif not callable(temperature):
        hint = "Give `nn.LearnedTemperature()`, `nn.ScheduledTemperature(start, end)` or a function of the step"
        fail("temperature", "be a number, a module or a function", type(temperature).__name__, hint, TypeError)
    return temperature


def with_constant_factor(loss: Tensor, temperature: float | Tensor) -> Tensor:
    """Return a loss that is multiplied by the temperature, without the gradient of that factor.

    The factor makes gradients comparable across temperatures. A learned temperature must not receive its gradient,
    which alone would lower it.

    Args:
        loss: A scalar ``temperature * f(temperature)``.
        temperature: The temperature of the loss, a number or a tensor of shape (1,).

    Returns:
        The same value, a scalar.
    """
    if not isinstance(temperature, Tensor):
        return loss
    temperature = temperature.reshape(())
    return loss * (temperature.detach() / temperature)
