"""The temperature of a step: a number, a learned parameter, or a function of the optimizer step."""

from typing import cast

import lightning as L
from torch import Tensor, nn

from lightning_contrast.callbacks._extension import planned
from lightning_contrast.nn import ScheduledTemperature
from lightning_contrast.nn.temperature import Temperature


def temperature_of(module: L.LightningModule) -> float | Tensor:
    """Return the temperature of this step, and log ``train/temperature`` where it is not a fixed number.

    A schedule is a function of ``trainer.global_step``, a number on the host, so that a resumed run goes on exactly
    where it stopped and nothing waits for the device. All micro-batches of a step have one temperature.

    Args:
        module: A method with an attribute ``temperature``.

    Returns:
        A number, or a tensor of one element with gradient where the temperature is learned.
    """
    temperature = cast("Temperature", module.temperature)
    if isinstance(temperature, int | float):
        return temperature
    value: float | Tensor
    if isinstance(temperature, nn.Module):
        value = temperature()
    elif isinstance(temperature, ScheduledTemperature):
        step: float = module.global_step
        total: float | None = None
        if temperature.steps is None:
            step, total = planned(module.trainer, step, module.trainer.estimated_stepping_batches)
        value = temperature(step, total)
    else:
        value = temperature(module.global_step)
    module.log("train/temperature", value.detach() if isinstance(value, Tensor) else value)
    return value


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
