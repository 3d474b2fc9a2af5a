"""What a module tells of itself that explains a collapse: its predictor, temperature, teacher, weights of terms."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast.callbacks.collapse.observer import momentum_pairs


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


def cause_of_collapse(facts: Facts) -> tuple[str, str]:
    """Return the likely cause of a complete collapse, and what to try."""
    if facts.variance_weight == 0:
        return "no variance term", (
            "`variance_weight` is 0, so nothing keeps the projections of different images apart; VICReg takes 25"
        )
    if facts.negatives:
        return "", "Check that negatives are other images' embeddings, and lower the learning rate"
    return _cause_with_teacher(facts) if facts.teacher else _cause_without_teacher(facts)


def _cause_with_teacher(facts: Facts) -> tuple[str, str]:
    if facts.predictor == "there":
        return "", "Raise the teacher's momentum, keep BatchNorm in the heads, check that targets have no gradient"
    what = "is nn.Identity" if facts.predictor == "identity" else "is missing"
    return "no predictor", f"There is a momentum network without negatives, and the predictor {what}: add one"


def _cause_without_teacher(facts: Facts) -> tuple[str, str]:
    if facts.predictor != "there":
        return "", "Add what keeps images apart: negatives, a variance term, or a predictor with a stopped gradient"
    if facts.predictor_lr == 0:
        return "predictor does not learn", "The predictor's learning rate is 0: give its parameters to the optimizer"
    return "no stop-gradient", (
        "There is a predictor and no momentum network: detach the target, `loss(predictor(z_a), z_b.detach())`; if it "
        f"is detached, keep the predictor's learning rate ({facts.predictor_lr or 0:g}) high while the others fall"
    )


def cause_of_prototypes(facts: Facts) -> tuple[str, str]:
    """Return the likely cause of a prototype collapse, and what to try."""
    if facts.center in ("zero", "missing"):
        what = "has stayed at zero" if facts.center == "zero" else "is missing"
        return "no centring", f"The centre of the teacher's logits {what}: centre them (DINO: `center_momentum` 0.9)"
    return "", "Centre the teacher's logits or balance the assignments (Sinkhorn), or raise the teacher's temperature"


def cause_of_dimensional(facts: Facts, highest: float) -> tuple[str, str]:
    """Return the likely cause of a dimensional collapse, and what to try; above ``highest`` it is the temperature."""
    if facts.temperature is not None and facts.temperature > highest:
        return "temperature too high", (
            f"With a temperature of {facts.temperature:g} logits lie within +-{1 / facts.temperature:.2g}, all "
            "negatives repel alike and one direction is enough; contrastive losses take 0.05 to 0.5"
        )
    if facts.variance_weight == 0 or not (facts.negatives or facts.teacher or facts.variance_weight):
        cause, advice = cause_of_collapse(facts)
        if cause:
            return cause, advice
    return "", (
        "Raise the weight of the term that decorrelates dimensions, weaken the strongest augmentation, widen the head, "
        "or lower the learning rate"
    )
