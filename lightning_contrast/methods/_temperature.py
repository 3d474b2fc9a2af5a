"""The temperature of a step: a number, a learned parameter, or a function of the optimizer step."""

from torch import Tensor


def with_constant_factor(loss: Tensor, temperature: float | Tensor) -> Tensor:
    """Return a loss that has the temperature as a factor, with that factor taken for a constant.

    The factor keeps the size of the gradient alike over temperatures. A learned temperature must not see it: it would
    fall for the sake of the factor alone.

    Args:
        loss: A scalar ``temperature * f(temperature)``.
        temperature: What the loss was called with.

    Returns:
        The same value.
    """
    if not isinstance(temperature, Tensor):
        return loss
    temperature = temperature.reshape(())
    return loss * (temperature.detach() / temperature)
