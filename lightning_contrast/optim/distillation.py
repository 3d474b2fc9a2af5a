"""Start and end values of the schedules of self-distillation methods."""

from dataclasses import dataclass

from lightning_contrast._checks import check_interval, check_not_negative, check_positive, check_probability


@dataclass(frozen=True)
class Schedules:
    """Start and end values of what changes over a run, and how gradients are clipped.

    Args:
        momentum: EMA momentum of the teacher at the first step, in [0, 1].
        final_lr: Learning rate at the end, absolute, >= 0.
        final_weight_decay: Weight decay at the end, >= 0.
        clip_grad: Maximum gradient norm, > 0; None for no clipping.
        freeze_last_layer_epochs: Epochs during which the last layers of the heads are frozen, >= 0.
        warmup_teacher_temperature: Temperature of the teacher in the first epoch, > 0.
        teacher_temperature: Temperature of the teacher after its warm-up, > 0.
        warmup_teacher_temperature_epochs: Epochs of that warm-up, >= 0.
        schedule_stretch: Length of the schedules as a multiple of the run, >= 1.
        warmup_start: Learning rate at the start of the warm-up as a share of its peak, in [0, 1].
    """

    momentum: float
    final_lr: float
    final_weight_decay: float
    clip_grad: float | None = None
    freeze_last_layer_epochs: int = 0
    warmup_teacher_temperature: float = 0.04
    teacher_temperature: float = 0.07
    warmup_teacher_temperature_epochs: int = 0
    schedule_stretch: float = 1.0
    warmup_start: float = 0.0

    def __post_init__(self) -> None:
        check_probability("momentum", self.momentum)
        check_not_negative("final_lr", self.final_lr)
        check_not_negative("final_weight_decay", self.final_weight_decay)
        if self.clip_grad is not None:
            check_positive("clip_grad", self.clip_grad, "Give None for no clipping")
        check_not_negative("freeze_last_layer_epochs", self.freeze_last_layer_epochs)
        check_positive("warmup_teacher_temperature", self.warmup_teacher_temperature, "The paper has 0.04")
        check_positive("teacher_temperature", self.teacher_temperature, "The paper has 0.07")
        check_not_negative("warmup_teacher_temperature_epochs", self.warmup_teacher_temperature_epochs)
        hint = "Give 1 for schedules that end with the run"
        check_interval("schedule_stretch", self.schedule_stretch, "[1, inf)", hint)
        check_probability("warmup_start", self.warmup_start)
