"""Schedules of the programs of MSN and I-JEPA."""

from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer

from lightning_contrast import optim
from lightning_contrast._checks import check_probability, require
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.callbacks._extension import planned
from lightning_contrast.methods._distillation import _SCHEDULED, DistillationModule
from lightning_contrast.nn import MaskedViT, build_masked_backbone


class StretchedModule(DistillationModule):
    """A vision transformer that can mask, and schedules that may be planned for a longer run than is made.

    Learning rate, weight decay and momentum go as in the programs of MSN (https://github.com/facebookresearch/msn) and
    I-JEPA (https://github.com/facebookresearch/ijepa): the rate rises from a share of its peak and falls as a cosine,
    the weight decay is a cosine, the momentum is linear, and each of them would end ``stretch`` times as late as the
    run does. Rate and decay of the first step are those of step 1, not 0.

    Args:
        backbone: See `build_masked_backbone`.
        backbone_kwargs: Further arguments of a backbone given by name.
        **settings: What `ContrastiveModule` takes.
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
        mend = "Give 1 for schedules that end with the run"
        require(stretch >= 1, "schedule_stretch", "be >= 1", stretch, mend)
        self.momentum, self.stretch, self.warmup_start = momentum, stretch, warmup_start

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the program's factor at an optimizer step."""
        length = int(self.stretch * total_steps)
        return optim.warmup_cosine(step + 1, warmup_steps, length, start=self.warmup_start, end=self._final_factor)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Set the weight decay of this step; ``global_step`` goes on where a run is resumed."""
        step, total = planned(self.trainer, self.trainer.global_step, self.trainer.estimated_stepping_batches)
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
