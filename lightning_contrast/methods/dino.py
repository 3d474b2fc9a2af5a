"""DINO: the student matches the EMA teacher's prototype distribution across multi-crop views.

Paper: https://arxiv.org/abs/2104.14294.
Reference implementation: facebookresearch/dino.
Differs from it: the teacher temperature warms up as in the paper, 0.04 to 0.07 in 30 epochs (the reference's default
stays at 0.04); the center is updated once per optimizer step instead of per micro-batch; class tokens are those of
timm's ViTs, whose position embeddings are resized without the reference's offset of 0.1.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_positive
from lightning_contrast.augment import dino_views
from lightning_contrast.losses import dino_loss
from lightning_contrast.methods.distillation import DistillationModule
from lightning_contrast.metrics.teacher import teacher_statistics
from lightning_contrast.nn import Center, Norm, build_head
from lightning_contrast.nn.backbones import with_vit_defaults
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.distillation import Schedules
from lightning_contrast.runtime.method_options import MethodOptions


class DINO(DistillationModule):
    """Distill an EMA teacher's output for global views into the student's output for all views.

    A batch holds two global views (B, C, h, w) and then any number of local views (or none), of any size; `forward`
    gives features (B, F). ``momentum_backbone`` is the teacher, which the paper evaluates. Logs
    ``train/teacher_entropy``, ``train/prototype_entropy`` (nats; both 0 in a collapse to one prototype, both ln K in a
    collapse to the uniform distribution) and ``train/agreement`` of student and teacher (0..1).

    For a ResNet-50 the paper uses ``optimizer="sgd"``, ``lr`` 0.03 x global batch / 256 and a constant weight decay of
    1e-4.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F). It must accept all
            sizes of views: a ViT by name is built with ``dynamic_img_size=True`` and ``drop_path_rate=0.1``.
        num_prototypes: K, the width of the logits, also of a custom ``projector``; >= 2.
        hidden_dim: Width of the head's hidden layers.
        bottleneck_dim: Width of the bottleneck before the prototypes.
        head_norm: Norm of the head's hidden layers, "batch", "layer" or None as in the paper.
        norm_last_layer: Keep all prototypes at length 1; False is better, but stable for small ViTs only.
        projector: A module (N, F) -> (N, K) that replaces the head; the teacher gets a copy. Its ``last_layer``, if it
            has one, is frozen in the first epochs.
        student_temperature: Divisor of the student's logits, > 0.
        teacher_temperature: Divisor of the teacher's logits after the warm-up, > 0.
        warmup_teacher_temperature: Divisor of the teacher's logits in the first epoch, > 0.
        warmup_teacher_temperature_epochs: Epochs of this warm-up; 0 for none.
        center_momentum: EMA momentum of the center, in [0, 1].
        momentum: EMA momentum of the teacher at the first step, in [0, 1]; rises to 1 as a cosine. 0.9995 is
            recommended for a batch of 256.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.0005 x global batch / 256.
        final_lr: Learning rate at the end, absolute.
        weight_decay: Weight decay at the start, of all parameters except norms and biases.
        final_weight_decay: Weight decay at the end of the cosine.
        warmup_epochs: Epochs of linear warm-up before the cosine to ``final_lr``; None is 10, fewer in short runs.
        freeze_last_layer_epochs: Epochs during which the prototypes are frozen.
        clip_grad: Maximum norm of each parameter's gradient; None for no clipping. A ``gradient_clip_val`` of the
            Trainer takes precedence.
        **options: See `MethodOptions`.
    """

    views = staticmethod(dino_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        head_norm: Norm = None,
        norm_last_layer: bool = True,
        projector: nn.Module | None = None,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_temperature_epochs: int = 30,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        final_lr: float = 1e-6,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        warmup_epochs: int | None = None,
        freeze_last_layer_epochs: int = 1,
        clip_grad: float | None = 3.0,
        **options: Unpack[MethodOptions],
    ) -> None:
        schedules = Schedules(
            momentum=momentum,
            final_lr=final_lr,
            final_weight_decay=final_weight_decay,
            clip_grad=clip_grad,
            freeze_last_layer_epochs=freeze_last_layer_epochs,
            warmup_teacher_temperature=warmup_teacher_temperature,
            teacher_temperature=teacher_temperature,
            warmup_teacher_temperature_epochs=warmup_teacher_temperature_epochs,
        )
        super().__init__(
            backbone,
            schedules=schedules,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            **with_vit_defaults(backbone, options),
        )
        check_positive("student_temperature", student_temperature, "The paper has 0.1")
        self.student_temperature = student_temperature
        self.projector = projector or build_head(
            "dino",
            self.feature_dim,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            num_prototypes=num_prototypes,
            norm=head_norm,
            norm_last_layer=norm_last_layer,
        )
        self.momentum_backbone, self.momentum_projector = teacher_of(self.backbone), teacher_of(self.projector)
        self.center = Center(num_prototypes, center_momentum)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean cross-entropy with the teacher's output for other global views, and features (B, F)."""
        views = self.batch_crops(batch, global_views=2)  # V x (B, C, h, w)
        features = forward_by_size(self.backbone, views)  # V x (B, F)
        student = self.projector(torch.cat(features)).split(len(views[0]))  # V x (B, K)
        with torch.no_grad():
            teacher_features = forward_by_size(self.momentum_backbone, views[:2])  # 2 x (B, F)
            logits = self.momentum_projector(torch.cat(teacher_features))  # (2B, K)
        teacher = logits.split(len(views[0]))  # 2 x (B, K)
        center, temperature = self.center(logits), self.teacher_temperature  # (K,), as of the last step
        loss = dino_loss(
            student,
            teacher,
            center,
            student_temperature=self.student_temperature,
            teacher_temperature=temperature,
        )
        self.log("train/loss", loss, batch_size=len(views[0]))
        self.log_all(teacher_statistics(student, teacher, center, temperature), batch_size=len(views[0]))
        # MomentumUpdate moves the teacher and commits the center after the optimizer step.
        return {"loss": loss, "features": features[0].detach()}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (student, teacher) modules."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def step_states(self) -> list[nn.Module]:
        """Return the center, which is updated once per optimizer step."""
        return [self.center]
