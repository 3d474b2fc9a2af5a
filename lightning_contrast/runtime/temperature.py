"""Temperatures that depend on the position of a run."""

import math
from typing import cast

import lightning as L
from torch import Tensor, nn

from lightning_contrast.nn.temperature import ScheduledTemperature, Temperature
from lightning_contrast.runtime.run_length import run_length
from lightning_contrast.runtime.schedule_position import schedule_offset, schedule_position


def current_temperature(module: L.LightningModule) -> float | Tensor:
    """Return the temperature of this step, and log ``train/temperature`` unless it is a fixed number.

    A schedule is a function of ``trainer.global_step``, which is known on the host: a resumed run continues exactly,
    there is no device synchronization, and all micro-batches of a step share one temperature.

    Args:
        module: A method with an attribute ``temperature``.

    Returns:
        A number, or a tensor of shape (1,) with gradient if the temperature is learned.
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
            step, total = schedule_position(module.trainer, step, run_length(module.trainer).total_steps)
        value = temperature(step, total)
    else:
        value = temperature(module.global_step)
    module.log("train/temperature", value.detach() if isinstance(value, Tensor) else value)
    return value


def warmup_steps_of(module: L.LightningModule, epochs: int) -> tuple[int, int]:
    """Return the optimizer steps that a run has done, and those of a warm-up of this many epochs.

    If the loader has no length, both are counted in epochs.

    Args:
        module: The method; without a Trainer it is at the start of a run.
        epochs: Length of the warm-up in epochs, >= 0.
    """
    if module._trainer is None:
        return 0, epochs
    warmup = run_length(module.trainer).steps_of(epochs)
    if not math.isfinite(warmup):
        return module.current_epoch, epochs
    return module.global_step + schedule_offset(module.trainer), int(warmup)
