"""Schedules as pure functions of the optimizer step.

Learning-rate schedules return a factor for `torch.optim.lr_scheduler.LambdaLR`; schedules of the weight decay and of a
teacher's momentum return the value. Optimizer steps are counted from 0.
"""

import math
from collections.abc import Sequence

from lightning_contrast._checks import check_choice, check_interval, check_not_negative, check_positive, require


def warmup_cosine(step: float, warmup_steps: int, total_steps: float, *, start: float = 0.0, end: float = 0.0) -> float:
    """Return the learning-rate factor of a linear warm-up followed by a half cosine.

    ``start + (1 - start) k / w`` in the first ``w`` steps, then
    ``end + (1 - end) (1 + cos(pi (k - w) / (T - w))) / 2``: the schedule of SimCLR, BYOL and MoCo v3, and with
    ``end=0.001`` that of Barlow Twins and VICReg.

    Args:
        step: Step k, >= 0; the factor is ``end`` after the last step.
        warmup_steps: Length w of the warm-up in steps, 0 for none.
        total_steps: Length T of the run in steps, warm-up included.
        start: Factor at step 0 of a warm-up.
        end: Factor at the end.

    Returns:
        The factor, unitless.

    Raises:
        ValueError: If the warm-up is longer than the run.
    """
    check_warmup(warmup_steps, total_steps)
    check_not_negative("step", step)
    if step < warmup_steps:
        return start + (1 - start) * step / warmup_steps
    return _cosine(step - warmup_steps, total_steps - warmup_steps, 1.0, end)


def check_warmup(warmup_steps: int, total_steps: float) -> None:
    """Check that a warm-up is not longer than its run.

    Args:
        warmup_steps: Length of the warm-up in steps, >= 0.
        total_steps: Length of the run in steps, > 0.

    Raises:
        ValueError: If it is longer; the message gives both lengths.
    """
    check_positive("total_steps", total_steps)
    check_not_negative("warmup_steps", warmup_steps)
    rule = f"be at most the {total_steps} steps of the run"
    hint = "Shorten the warm-up (`warmup_epochs` of a method), or train longer"
    require(warmup_steps <= total_steps, "warmup_steps", rule, warmup_steps, hint)


def constant(step: int) -> float:
    """Return the factor 1 at every step.

    Args:
        step: Step; not used.
    """
    return 1.0


def step_decay(step: int, milestones: Sequence[int], *, factor: float = 0.1) -> float:
    """Return ``factor`` to the power of the number of milestones reached, the schedule of MoCo v1 and NPID.

    Args:
        step: Step, >= 0.
        milestones: Steps at which the rate is lowered.
        factor: Multiplier per milestone, > 0.

    Returns:
        The factor, unitless.
    """
    check_positive("factor", factor)
    return factor ** sum(step >= milestone for milestone in milestones)


def weight_decay_cosine(step: float, total_steps: float, start: float, end: float) -> float:
    """Return the weight decay of a half cosine from ``start`` to ``end`` (DINO: 0.04 to 0.4).

    Args:
        step: Step, >= 0; the value is ``end`` after the last step.
        total_steps: Length of the run in steps, > 0.
        start: Decay at step 0, >= 0.
        end: Decay at the end, >= 0.

    Returns:
        The decay, for the decayed parameter group.
    """
    check_positive("total_steps", total_steps)
    check_not_negative("start", start)
    check_not_negative("end", end)
    return _cosine(step, total_steps, start, end)


def momentum_schedule(step: int, total_steps: int, start: float, end: float = 1.0, kind: str = "cosine") -> float:
    """Return the momentum of a teacher at a step.

    Args:
        step: Step, >= 0; the value is ``end`` after the last step.
        total_steps: Length of the run in steps, > 0; not used by ``"constant"``.
        start: Momentum at step 0, in [0, 1].
        end: Momentum at the end, in [0, 1].
        kind: ``"cosine"`` (BYOL, DINO, MoCo v3), ``"linear"`` (MSN, I-JEPA) or ``"constant"`` (MoCo: ``start``).

    Returns:
        The share of the teacher that is kept, in [0, 1].
    """
    check_choice("kind", kind, ("cosine", "linear", "constant"))
    for name, value in (("start", start), ("end", end)):
        check_interval(name, value, "[0, 1]", "Give the share of the teacher that is kept")
    if kind == "constant":
        return start
    check_positive("total_steps", total_steps)
    if kind == "linear":
        return start + (end - start) * min(step / total_steps, 1.0)
    return _cosine(step, total_steps, start, end)


def scaled_lr(base_lr: float, batch_size: int, rule: str = "linear") -> float:
    """Return the learning rate for a global batch size.

    Args:
        base_lr: Base rate, >= 0.
        batch_size: Images per optimizer step over all ranks and accumulated batches, > 0.
        rule: ``"linear"`` for ``base_lr * batch_size / 256``, ``"sqrt"`` for ``base_lr * sqrt(batch_size)``.

    Returns:
        The rate; SimCLR's 0.3 (linear) and 0.075 (sqrt) both give 4.8 for 4096 images.
    """
    check_not_negative("base_lr", base_lr)
    check_positive("batch_size", batch_size)
    check_choice("rule", rule, ("linear", "sqrt"))
    return base_lr * batch_size / 256 if rule == "linear" else base_lr * math.sqrt(batch_size)


def _cosine(step: float, total: float, start: float, end: float) -> float:
    """Return a half cosine from ``start`` at step 0 to ``end`` at step ``total`` and later."""
    progress = 1.0 if step >= total else step / total
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmed_up(now: int, start: float, end: float, warmup: int) -> float:
    """Return the teacher temperature: a linear warm-up from ``start`` to ``end``, then ``end``.

    Args:
        now: Epoch or optimizer step, >= 0.
        start: Temperature at 0.
        end: Temperature at the last epoch or step of the warm-up and later.
        warmup: Length of the warm-up in epochs or steps; 0 for none.
    """
    if now >= warmup:
        return end
    return start + (end - start) * now / max(1, warmup - 1)
