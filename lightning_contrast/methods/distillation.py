"""What the methods with a student, a teacher and prototypes share beside their algorithms: schedules and clipping."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_contrast import optim
from lightning_contrast._checks import check_not_negative, check_positive, check_probability, fail, require
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import MaskedViT, build_masked_backbone
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.schedules import warmed_up
from lightning_contrast.runtime.schedule_position import schedule_offset, schedule_position

_SCHEDULED = "scheduled_decay"  # key of the parameter group whose weight decay follows the schedule


class DistillationModule(SelfSupervisedModule):
    """Schedules of DINO's program (https://github.com/facebookresearch/dino, ``main_dino.py``) and its clipping.

    The learning rate rises from 0 to its peak in the warm-up and falls as a cosine to ``final_lr``; the weight decay
    goes as a cosine from ``weight_decay`` to ``final_weight_decay``, both once an optimizer step. Before each step
    every gradient is clipped on its own, and those of `last_layers` are dropped in the first epochs.

    A subclass calls `set_schedules` and `set_temperatures` in its constructor.
    """

    base_lr: ClassVar[float] = 0.0005
    warms_up_by_step: ClassVar[bool] = False
    """The teacher's temperature rises in every optimizer step, and not once an epoch."""
    final_lr: float
    final_weight_decay: float
    clip_grad: float | None
    freeze_last_layer_epochs: int
    student_temperature: float
    temperatures: tuple[float, float, int]
    _final_factor: float = 0.0

    def set_schedules(
        self, *, final_lr: float, final_weight_decay: float, clip_grad: float | None, freeze_last_layer_epochs: int
    ) -> None:
        """Check and keep the numbers of the schedules.

        Args:
            final_lr: Learning rate at the end of the run, absolute, >= 0.
            final_weight_decay: Weight decay at the end of the run, >= 0.
            clip_grad: Largest norm of each parameter's gradient, > 0; None for no clipping.
            freeze_last_layer_epochs: Epochs in which the last layers keep their weights, >= 0.
        """
        check_not_negative("final_lr", final_lr)
        check_not_negative("final_weight_decay", final_weight_decay)
        check_not_negative("freeze_last_layer_epochs", freeze_last_layer_epochs)
        if clip_grad is not None:
            check_positive("clip_grad", clip_grad, "Give None for no clipping")
        self.final_lr, self.final_weight_decay = final_lr, final_weight_decay
        self.clip_grad, self.freeze_last_layer_epochs = clip_grad, freeze_last_layer_epochs

    def set_temperatures(self, student: float, teacher: float, start: float, epochs: int) -> None:
        """Check and keep the temperatures.

        Args:
            student: Divisor of the student's logits, > 0.
            teacher: Divisor of the teacher's logits after its warm-up, > 0.
            start: Divisor of the teacher's logits in the first epoch, > 0.
            epochs: Epochs of the warm-up, >= 0.
        """
        check_positive("student_temperature", student, "The paper has 0.1")
        check_positive("teacher_temperature", teacher, "The paper has 0.07")
        check_positive("teacher_temperature_start", start, "The paper has 0.04")
        check_not_negative("teacher_temperature_epochs", epochs)
        self.student_temperature, self.temperatures = student, (start, teacher, epochs)

    @property
    def teacher_temperature(self) -> float:
        """The teacher's temperature now."""
        start, end, epochs = self.temperatures
        now, warmup = _steps(self, epochs) if self.warms_up_by_step else (self.current_epoch, epochs)
        return warmed_up(now, start, end, warmup)

    def last_layers(self) -> Sequence[nn.Module]:
        """Return the student's layers that are frozen at first: the heads' prototypes."""
        heads = [head for name, head in self.named_children() if not name.startswith("momentum_")]
        layers = [getattr(head, name, None) for head in heads for name in ("last_layer", "patch_last_layer")]
        return [layer for layer in layers if isinstance(layer, nn.Module)]

    def log_all(self, values: Mapping[str, Tensor], batch_size: int) -> None:
        """Log values under ``train/``.

        Args:
            values: Scalars by name.
            batch_size: Images of this rank.
        """
        for name, value in values.items():
            self.log(f"train/{name}", value, batch_size=batch_size)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups; norms, biases and all vectors carry no weight decay, ever."""
        decayed, others = super().parameter_groups()
        return [decayed | {_SCHEDULED: True}, others]

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule per optimizer step."""
        configured = super().configure_optimizers()
        peak = max(group["initial_lr"] for group in configured["optimizer"].param_groups)
        hint = "Lower it: the learning rate falls to it from its peak"
        require(self.final_lr <= peak, "final_lr", f"be at most the peak of {peak:g}", self.final_lr, hint)
        self._final_factor = self.final_lr / peak  # asked for from step 1 on; a schedule starts at 0 or at its peak
        return configured

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the program's factor: its warm-up reaches the peak one step early, and its cosine ends above 0."""
        if step < warmup_steps:
            return step / max(1, warmup_steps - 1)
        return optim.warmup_cosine(step, warmup_steps, total_steps, end=self._final_factor)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Set the weight decay of this step; ``global_step`` goes on where a run is resumed."""
        step, total = schedule_position(
            self.trainer, self.trainer.global_step, int(self.trainer.estimated_stepping_batches)
        )
        decay = optim.weight_decay_cosine(step, total, self.weight_decay, self.final_weight_decay)
        for group in optimizer.param_groups:
            if group.get(_SCHEDULED):
                group["weight_decay"] = decay

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each gradient on its own, or as the Trainer is told to; then freeze the last layers by dropping theirs.

        A parameter without gradient is left alone by the optimizer, weight decay included, and DDP, which has summed
        all gradients by now, sees nothing of it.
        """
        if gradient_clip_val is not None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self.clip_grad is not None:
            self._check_unscaled(optimizer)
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            optim.clip_each_gradient(parameters, self.clip_grad)
        if self.current_epoch < self.freeze_last_layer_epochs:
            for layer in self.last_layers():
                for parameter in layer.parameters():
                    parameter.grad = None

    def _check_unscaled(self, optimizer: Optimizer) -> None:
        """Refuse gradients that a fused optimizer will unscale only in its step."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            hint = "Build the optimizer with fused=False, set `clip_grad=None`, or use bf16-mixed"
            fail("clip_grad", "be None for a fused optimizer under 16-mixed", self.clip_grad, hint)


def _steps(module: SelfSupervisedModule, epochs: int) -> tuple[int, int]:
    """Return how many optimizer steps a run has done, and how many a number of epochs takes.

    Where the loader has no length both are counted in epochs.

    Args:
        module: The method; without a Trainer it stands at the start.
        epochs: Epochs, >= 0.
    """
    if module._trainer is None:
        return 0, epochs
    batches = module.trainer.num_training_batches
    if not math.isfinite(batches):
        return module.current_epoch, epochs
    step = module.global_step + schedule_offset(module.trainer)
    return step, epochs * math.ceil(batches / module.trainer.accumulate_grad_batches)


class MaskedDistillationModule(DistillationModule):
    """A `DistillationModule` whose backbone can mask patches.

    Args:
        backbone: See `build_masked_backbone`.
        defaults: See there.
        momentum: Share of the teacher that the first step keeps, in [0, 1].
        settings: Further arguments of `SelfSupervisedModule`.
    """

    backbone: MaskedViT
    momentum_backbone: MaskedViT
    sharded_methods: ClassVar[dict[str, Sequence[str]]] = {"backbone": ["tokens"], "momentum_backbone": ["tokens"]}
    encodes_whole_images: ClassVar[bool] = False

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool,
        feature_dim: int | None,
        backbone_kwargs: dict[str, Any] | None,
        defaults: Mapping[str, Any],
        momentum: float,
        optimizer: OptimizerLike,
        lr: float | None,
        weight_decay: float,
        warmup_epochs: int,
    ) -> None:
        network, feature_dim = build_masked_backbone(
            backbone,
            small_images=small_images,
            feature_dim=feature_dim,
            backbone_kwargs=backbone_kwargs,
            defaults=defaults,
        )
        super().__init__(
            network,
            small_images=False,
            feature_dim=feature_dim,
            backbone_kwargs=None,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
        )
        check_probability("momentum", momentum)
        self.momentum = momentum

    def default_callbacks(self) -> list[L.Callback]:
        """Return what moves the teacher and the centres."""
        return [MomentumUpdate(self.momentum)]


class StretchedModule(DistillationModule):
    """A vision transformer that can mask, and schedules that may be planned for a longer run than is made.

    Learning rate, weight decay and momentum go as in the programs of MSN (https://github.com/facebookresearch/msn) and
    I-JEPA (https://github.com/facebookresearch/ijepa): the rate rises from a share of its peak and falls as a cosine,
    the weight decay is a cosine, the momentum is linear, and each of them would end ``stretch`` times as late as the
    run does. Rate and decay of the first step are those of step 1, not 0.

    Args:
        backbone: See `build_masked_backbone`.
        backbone_kwargs: Further arguments of a backbone given by name.
        **settings: What `SelfSupervisedModule` takes.
    """

    backbone: MaskedViT
    momentum_backbone: MaskedViT
    momentum: float
    stretch: float
    warmup_start: float

    def __init__(self, backbone: str | nn.Module, *, backbone_kwargs: dict[str, Any] | None, **settings: Any) -> None:
        module, feature_dim = build_masked_backbone(
            backbone,
            small_images=settings["small_images"],
            feature_dim=settings["feature_dim"],
            backbone_kwargs=backbone_kwargs,
            mask_token=False,
        )
        sizes = {"small_images": False, "feature_dim": feature_dim}
        super().__init__(module, backbone_kwargs=None, **(settings | sizes))

    def set_stretch(self, *, momentum: float, stretch: float, warmup_start: float) -> None:
        """Check and keep what `set_schedules` does not know.

        Args:
            momentum: Share of the teacher that the first step keeps, in [0, 1].
            stretch: Length of the schedules over that of the run, >= 1.
            warmup_start: Learning rate at the start of the warm-up as a share of its peak, in [0, 1].
        """
        check_probability("momentum", momentum)
        check_probability("warmup_start", warmup_start)
        hint = "Give 1 for schedules that end with the run"
        require(stretch >= 1, "schedule_stretch", "be >= 1", stretch, hint)
        self.momentum, self.stretch, self.warmup_start = momentum, stretch, warmup_start

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the program's factor at an optimizer step."""
        length = int(self.stretch * total_steps)
        return optim.warmup_cosine(step + 1, warmup_steps, length, start=self.warmup_start, end=self._final_factor)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Set the weight decay of this step; ``global_step`` goes on where a run is resumed."""
        step, total = schedule_position(self.trainer, self.trainer.global_step, self.trainer.estimated_stepping_batches)
        stretched = int(self.stretch * total)
        decay = optim.weight_decay_cosine(step + 1, stretched, self.weight_decay, self.final_weight_decay)
        for group in optimizer.param_groups:
            if group.get(_SCHEDULED):
                group["weight_decay"] = decay

    def encoder(self) -> list[nn.Module]:
        """Return the modules whose gradients are clipped together."""
        return [self.backbone]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the encoder's gradients by their common norm, or all as the Trainer is told to."""
        if gradient_clip_val is not None or self.clip_grad is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        self._check_unscaled(optimizer)
        parameters = (parameter for module in self.encoder() for parameter in module.parameters())
        optim.clip_gradients_together(parameters, self.clip_grad)

    def default_callbacks(self) -> list[L.Callback]:
        """Return what moves the teacher: its momentum rises in a line that reaches 1 at the end of the schedules."""
        end = self.momentum + (1 - self.momentum) / self.stretch
        return [MomentumUpdate(self.momentum, end, "linear")]
