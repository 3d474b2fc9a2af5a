"""What a module tells of itself that explains a collapse: its predictor, temperature, teacher, weights of terms."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast.callbacks._observer import momentum_pairs


@dataclass(frozen=True)
class Facts:
    """What is known of a run beside its features; None where a module does not say."""

    temperature: float | None = None
    """Of a contrastive softmax."""
    teacher: bool = False
    """There is a network that follows another one."""
    negatives: bool = False
    """There is a temperature or a queue, so other images repel."""
    predictor: str | None = None
    """"there", "missing", or "identity" where it is `nn.Identity`."""
    predictor_lr: float | None = None
    variance_weight: float | None = None
    center: str | None = None
    """Of a teacher's logits: "zero" where it has stayed there, "there", "balanced" where Sinkhorn takes its place, or
    "missing"; None without a ``teacher_temperature``."""


def read_facts(trainer: Any, module: Any) -> Facts:
    """Read the facts of a module; costs a few host reads.

    Args:
        trainer: Its optimizers tell the predictor's learning rate.
        module: The LightningModule.
    """
    temperature = temperature_of(trainer, module)
    queues = getattr(module, "queues", None)
    predictor = getattr(module, "predictor", None)
    weight = getattr(module, "variance_weight", None)
    return Facts(
        temperature=None if temperature is None else float(temperature),
        teacher=bool(momentum_pairs(module)),
        negatives=temperature is not None or (callable(queues) and bool(queues())),
        predictor=_predictor(predictor),
        predictor_lr=_learning_rate(trainer, predictor),
        variance_weight=float(weight) if isinstance(weight, int | float) else None,
        center=_center(module),
    )


def _predictor(predictor: Any) -> str:
    if not isinstance(predictor, nn.Module):
        return "missing"
    return "identity" if isinstance(predictor, nn.Identity) else "there"


def _learning_rate(trainer: Any, predictor: Any) -> float | None:
    """Return the learning rate of a module's parameters, 0 where no optimizer has them, None without any."""
    own = {id(p) for p in predictor.parameters()} if isinstance(predictor, nn.Module) else set()
    if not own:
        return None
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [float(group["lr"]) for group in groups if any(id(p) in own for p in group["params"])]
    return max(rates, default=0.0)


def _center(module: Any) -> str | None:
    """Return what is known of a distillation's centre."""
    if not isinstance(getattr(module, "teacher_temperature", None), int | float):
        return None
    value = getattr(getattr(module, "center", None), "value", getattr(module, "center", None))
    if not isinstance(value, Tensor):
        balanced = any(
            "sinkhorn" in name or (isinstance(item, str) and item == "sinkhorn") for name, item in vars(module).items()
        )
        return "balanced" if balanced else "missing"
    return "there" if bool(value.any()) else "zero"


def temperature_of(trainer: Any, module: Any) -> Any:
    """Return a module's temperature as a number or tensor, None where it has none that is positive.

    Args:
        trainer: Its ``callback_metrics`` are asked where the temperature is a schedule.
        module: ``temperature`` is an attribute of it, or of its ``criterion`` or ``loss``.
    """
    owners = (module, getattr(module, "criterion", None), getattr(module, "loss", None))
    for value in (getattr(owner, "temperature", None) for owner in owners):
        if isinstance(value, torch.nn.Module):
            with torch.no_grad():
                value = value()  # noqa: PLW2901
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.detach()
        if isinstance(value, int | float) and value > 0:
            return value
        if callable(value):
            return trainer.callback_metrics.get("train/temperature")
    return None
