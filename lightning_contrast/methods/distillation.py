"""Schedules and gradient clipping of the self-distillation methods: DINO, iBOT, DINOv2, MSN, I-JEPA."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_contrast import optim
from lightning_contrast._checks import require
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Backbone, MaskedViT
from lightning_contrast.optim.distillation import Schedules
from lightning_contrast.optim.layer_decay import apply_rates
from lightning_contrast.optim.schedules import warmed_up
from lightning_contrast.runtime.gradient_scaling import check_unscaled
from lightning_contrast.runtime.run_length import run_length
from lightning_contrast.runtime.schedule_position import schedule_position
from lightning_contrast.runtime.temperature import warmup_steps_of

_SCHEDULED = "scheduled_decay"  # key of the parameter group whose weight decay follows the schedule


class DistillationModule(SelfSupervisedModule):
    """Schedules of DINO's reference implementation (https://github.com/facebookresearch/dino, ``main_dino.py``).

    The learning rate rises from 0 to its peak and falls as a cosine to ``final_lr``; the weight decay follows a cosine
    to ``final_weight_decay``; the teacher's momentum rises to 1 as a cosine. All are updated every optimizer step.
    Each gradient is clipped on its own, and those of `last_layers` are dropped in the first epochs.

    Args:
        backbone: See `SelfSupervisedModule`.
        schedules: Start and end values.
        **settings: Further arguments of `SelfSupervisedModule`.
    """

    base_lr: ClassVar[float] = 0.0005
    warms_up_by_step: ClassVar[bool] = False
    """Update the teacher's temperature every optimizer step instead of every epoch."""
    _final_factor: float = 0.0

    def __init__(self, backbone: str | nn.Module | Backbone, *, schedules: Schedules, **settings: Any) -> None:
        super().__init__(backbone, **settings)
        self.schedules = schedules

    @property
    def teacher_temperature(self) -> float:
        """The teacher's temperature now."""
        return self.warmed_up(self.schedules.teacher_temperature)

    def warmed_up(self, temperature: float) -> float:
        """Return a temperature of the teacher now, given that after the linear warm-up."""
        epochs = self.schedules.warmup_teacher_temperature_epochs
        now, warmup = warmup_steps_of(self, epochs) if self.warms_up_by_step else (self.current_epoch, epochs)
        return warmed_up(now, self.schedules.warmup_teacher_temperature, temperature, warmup)

    def last_layers(self) -> Sequence[nn.Module]:
        """Return the student's layers that are frozen at first: the prototypes of the heads."""
        heads = [head for name, head in self.named_children() if not name.startswith("momentum_")]
        layers = [getattr(head, name, None) for head in heads for name in ("last_layer", "patch_last_layer")]
        return [layer for layer in layers if isinstance(layer, nn.Module)]

    def log_all(self, values: Mapping[str, Tensor], batch_size: int) -> None:
        """Log scalars by name under ``train/``; ``batch_size`` is the number of images of this rank."""
        for name, value in values.items():
            self.log(f"train/{name}", value, batch_size=batch_size)

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback, which also commits the centers."""
        return [MomentumUpdate(self.schedules.momentum)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups; norms, biases and all other vectors never have weight decay."""
        decayed, others = super().parameter_groups()
        return [decayed | {_SCHEDULED: True}, others]

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule, with the groups' own factors of the learning rate."""
        configured = super().configure_optimizers()
        peak = max(group["initial_lr"] for group in configured["optimizer"].param_groups)
        final_lr, hint = self.schedules.final_lr, "Lower it: the learning rate falls to it from its peak"
        require(final_lr <= peak, "final_lr", f"be at most the peak of {peak:g}", final_lr, hint)
        self._final_factor = final_lr / peak  # read from step 1 on; a schedule starts at 0 or at its peak
        apply_rates(configured)
        return configured

    def scale_lr(self, ratio: float) -> None:
        """Multiply all peak learning rates by a ratio; the schedule still ends at ``final_lr``."""
        self._final_factor = min(1.0, self._final_factor / ratio)
        super().scale_lr(ratio)

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the share of the peak rate: the warm-up reaches it one step early, the cosine ends at ``final_lr``."""
        if step < warmup_steps:
            return step / max(1, warmup_steps - 1)
        return optim.warmup_cosine(step, warmup_steps, total_steps, end=self._final_factor)

    def weight_decay_at(self, step: float, total_steps: float) -> float:
        """Return the weight decay of an optimizer step."""
        return optim.weight_decay_cosine(step, total_steps, self.weight_decay, self.schedules.final_weight_decay)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Set the weight decay of this step."""
        trainer = self.trainer
        position = schedule_position(trainer, trainer.global_step, run_length(trainer).total_steps)
        decay = self.weight_decay_at(*position)
        for group in optimizer.param_groups:
            if group.get(_SCHEDULED):
                group["weight_decay"] = decay

    def clip(self, optimizer: Optimizer, clip_grad: float) -> None:
        """Clip the norm of each gradient on its own."""
        optim.clip_each_gradient((p for group in optimizer.param_groups for p in group["params"]), clip_grad)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the Trainer's ``gradient_clip_val`` says, else by ``clip_grad``; then freeze the last layers.

        They are frozen by dropping their gradients, so the optimizer skips them, weight decay included, and DDP, which
        has already reduced all gradients, is not affected.
        """
        clip_grad = self.schedules.clip_grad
        if gradient_clip_val is not None or clip_grad is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            check_unscaled(self.trainer, optimizer, clip_grad)
            self.clip(optimizer, clip_grad)
        if self.current_epoch < self.schedules.freeze_last_layer_epochs:
            for parameter in (p for layer in self.last_layers() for p in layer.parameters()):
                parameter.grad = None


class StretchedModule(DistillationModule):
    """Schedules of MSN (https://github.com/facebookresearch/msn) and I-JEPA (https://github.com/facebookresearch/ijepa).

    The learning rate rises from a share of its peak and falls as a cosine, the weight decay follows a cosine, the
    momentum is linear, and all of them end ``schedule_stretch`` times as late as the run. Learning rate and weight
    decay of the first step are those of step 1, not 0. Gradients are clipped by the norm of the whole `encoder`.
    """

    backbone: MaskedViT
    momentum_backbone: MaskedViT

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback: the momentum is linear and would reach 1 at the end of the stretched schedules."""
        momentum = self.schedules.momentum
        return [MomentumUpdate(momentum, momentum + (1 - momentum) / self.schedules.schedule_stretch, "linear")]

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the share of the peak rate at an optimizer step."""
        total, start = int(self.schedules.schedule_stretch * total_steps), self.schedules.warmup_start
        return optim.warmup_cosine(step + 1, warmup_steps, total, start=start, end=self._final_factor)

    def weight_decay_at(self, step: float, total_steps: float) -> float:
        """Return the weight decay of an optimizer step."""
        return super().weight_decay_at(step + 1, int(self.schedules.schedule_stretch * total_steps))

    def encoder(self) -> list[nn.Module]:
        """Return the modules whose gradients are clipped together."""
        return [self.backbone]

    def clip(self, optimizer: Optimizer, clip_grad: float) -> None:
        """Clip the common norm of the encoder's gradients."""
        optim.clip_gradients_together((p for module in self.encoder() for p in module.parameters()), clip_grad)
