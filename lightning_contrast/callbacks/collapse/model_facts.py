"""Attributes of a module that explain a collapse, and the likely causes derived from them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast.callbacks.collapse.recorder import momentum_pairs


@dataclass(frozen=True)
class Facts:
    """Attributes of a module and its optimizer; None if unknown."""

    temperature: float | None = None
    """Temperature of a contrastive softmax."""
    teacher: bool = False
    """Whether there is a momentum network."""
    negatives: bool = False
    """Whether there are negatives, i.e. a temperature or a queue."""
    predictor: str | None = None
    """"present", "missing", or "identity" for `nn.Identity`."""
    predictor_lr: float | None = None
    """Learning rate of the predictor; 0 if no optimizer has its parameters."""
    variance_weight: float | None = None
    """Weight of the variance term."""
    center: str | None = None
    """Center of the teacher's logits: "present", "zero" if it was never updated, "balanced" if Sinkhorn replaces it, or
    "missing"; None without a ``teacher_temperature``."""


def read_facts(trainer: Any, module: Any) -> Facts:
    """Collect the facts of a module; synchronizes with the device.

    Args:
        trainer: The Trainer, whose optimizers have the predictor's learning rate.
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
    return "identity" if isinstance(predictor, nn.Identity) else "present"


def _learning_rate(trainer: Any, predictor: Any) -> float | None:
    """Return the largest learning rate of the parameters, 0 if no optimizer has them, None without parameters."""
    own = {id(p) for p in predictor.parameters()} if isinstance(predictor, nn.Module) else set()
    if not own:
        return None
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [float(group["lr"]) for group in groups if any(id(p) in own for p in group["params"])]
    return max(rates, default=0.0)


def _center(module: Any) -> str | None:
    """Return the state of the center of a teacher's logits."""
    if not isinstance(getattr(module, "teacher_temperature", None), int | float):
        return None
    value = getattr(getattr(module, "center", None), "value", getattr(module, "center", None))
    if not isinstance(value, Tensor):
        balanced = any(
            "sinkhorn" in name or (isinstance(item, str) and item == "sinkhorn") for name, item in vars(module).items()
        )
        return "balanced" if balanced else "missing"
    return "present" if bool(value.any()) else "zero"


def temperature_of(trainer: Any, module: Any) -> Any:
    """Return the temperature of a module as a number or scalar tensor, None if there is none.

    Args:
        trainer: The Trainer, whose ``callback_metrics`` have the temperature if it is a schedule.
        module: Module with an attribute ``temperature``, or with one in its ``criterion`` or ``loss``.
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


def cause_of_collapse(facts: Facts) -> tuple[str, str]:
    """Return the likely cause of a complete collapse, "" if unknown, and advice."""
    if facts.variance_weight == 0:
        return "no variance term", (
            "`variance_weight` is 0, so projections of different images are not kept apart; VICReg uses 25"
        )
    if facts.negatives:
        return "", "Check that negatives are embeddings of other images, and lower the learning rate"
    return _cause_with_teacher(facts) if facts.teacher else _cause_without_teacher(facts)


def _cause_with_teacher(facts: Facts) -> tuple[str, str]:
    if facts.predictor == "present":
        return "", "Raise the momentum of the teacher, keep BatchNorm in the heads, check that targets have no gradient"
    state = "is nn.Identity" if facts.predictor == "identity" else "is missing"
    return "no predictor", f"There is a momentum network without negatives, and the predictor {state}: add one"


def _cause_without_teacher(facts: Facts) -> tuple[str, str]:
    if facts.predictor != "present":
        return "", "Add a term that keeps images apart: negatives, a variance term, or a predictor with stop-gradient"
    if facts.predictor_lr == 0:
        return (
            "predictor does not learn",
            "The learning rate of the predictor is 0: add its parameters to the optimizer",
        )
    return "no stop-gradient", (
        "There is a predictor and no momentum network: detach the target, `loss(predictor(z_a), z_b.detach())`; if it "
        f"is detached, keep the learning rate of the predictor ({facts.predictor_lr or 0:g}) constant while others "
        "decay"
    )


def cause_of_prototypes(facts: Facts) -> tuple[str, str]:
    """Return the likely cause of a prototype collapse, "" if unknown, and advice."""
    if facts.center in ("zero", "missing"):
        state = "was never updated" if facts.center == "zero" else "is missing"
        return "no centering", f"The center of the teacher's logits {state}: center them (DINO: `center_momentum` 0.9)"
    return "", "Center the teacher's logits or balance the assignments (Sinkhorn), or raise the teacher temperature"


def cause_of_dimensional(facts: Facts, max_temperature: float) -> tuple[str, str]:
    """Return the likely cause of a dimensional collapse, "" if unknown, and advice.

    Args:
        facts: Facts of the module.
        max_temperature: A temperature above this is the cause.
    """
    if facts.temperature is not None and facts.temperature > max_temperature:
        return "temperature too high", (
            f"With a temperature of {facts.temperature:g} logits are within +-{1 / facts.temperature:.2g}, so all "
            "negatives have nearly equal weight; contrastive losses use 0.05 to 0.5"
        )
    if facts.variance_weight == 0 or not (facts.negatives or facts.teacher or facts.variance_weight):
        cause, advice = cause_of_collapse(facts)
        if cause:
            return cause, advice
    return "", (
        "Raise the weight of the decorrelation term, weaken the strongest augmentation, widen the head, "
        "or lower the learning rate"
    )
