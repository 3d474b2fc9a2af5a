"""DINOv3: DINOv2 with constant schedules, and patches whose similarities are anchored to an earlier teacher's.

Paper: https://arxiv.org/abs/2508.10104.
Reference implementation: facebookresearch/dinov3, sizes of its ImageNet-1k configuration.
Differs from it: the Gram teacher sees the student's own global views, not the same crops at a higher resolution and
without color distortion; its loss has no warm-up; last layers are weight-normalized as in DINOv2; gradients are clipped
per parameter; rotary positions are not augmented; no second stage at a high resolution.
"""

from typing import Any, ClassVar, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast._checks import (
    check_at_least,
    check_not_negative,
    check_positive,
    check_probability,
    check_range,
)
from lightning_contrast.augment import dinov2_views
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.losses import dino_loss, gram_loss, koleo_loss, masked_patch_loss
from lightning_contrast.methods.distillation import DistillationModule
from lightning_contrast.metrics.teacher import teacher_statistics
from lightning_contrast.nn import HeadOptions, MaskedViT, build_head, build_masked_backbone
from lightning_contrast.nn.ema_sharded import copy_weights
from lightning_contrast.nn.masking import dinov2_masks, draw_masks, gather, join_globals
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.distillation import Schedules
from lightning_contrast.optim.layer_decay import split_by_rate
from lightning_contrast.runtime.fsdp import full_weights
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class DINOv3(DistillationModule):
    """Distill an EMA teacher as in DINOv2, and keep the similarities of the patches near those of an earlier teacher.

    Batches and logs are those of `DINOv2`, with ``train/gram_loss``. ``momentum_backbone`` is the teacher,
    ``gram_backbone`` its copy of an earlier epoch. Registers and rotary positions are options of the backbone:
    ``backbone_kwargs=dict(reg_tokens=4, rope=True)`` of "small_vit", or `nn.use_rope` of a module.

    Args:
        backbone: "small_vit", the name of a timm ViT, or such a module: see `build_masked_backbone`. By name it accepts
            views of any size and has a drop path of 0.3 and LayerScale from 1e-5.
        num_prototypes: K, the width of the logits of class tokens, and of those of patches; >= 2.
        hidden_dim: Width of the heads' hidden layers.
        bottleneck_dim: Width of the bottleneck before the prototypes; patches have a head of their own.
        gram_start_epoch: First epoch with Gram anchoring, >= 1; 1,000 epochs of 1,000 steps in the paper's 7B model.
        gram_every_epochs: Epochs after which the Gram teacher is replaced by the teacher; 10 of those in the paper.
        gram_updates: How often it is replaced, >= 0.
        gram_weight: Weight of the Gram loss, >= 0.
        mask_probability: Share of the global views that are masked.
        mask_ratio: Minimum and maximum share of their masked patches.
        patch_weight: Weight of the patches' loss, >= 0.
        koleo_weight: Weight of the KoLeo loss of the features of each global view, >= 0.
        student_temperature: Divisor of the student's logits, > 0.
        teacher_temperature: Divisor of the teacher's logits after the warm-up, > 0.
        warmup_teacher_temperature: Divisor of the teacher's logits in the first step, > 0.
        warmup_teacher_temperature_epochs: Epochs of this warm-up, which is updated every step; 0 for none.
        momentum: EMA momentum of the teacher, constant, in [0, 1].
        optimizer: "adamw" as in the paper, with betas (0.9, 0.99), "sgd", "lars", "lamb", or a callable.
        lr: Constant learning rate, absolute; None is the paper's 0.0002 x sqrt(global batch / 1024).
        layer_decay: Learning rate of each block as a share of the next block's.
        patch_lr_multiplier: Factor of the learning rate of the patch embedding.
        weight_decay: Weight decay of all parameters except norms and biases, constant.
        warmup_epochs: Epochs of linear warm-up; None is 100, fewer in short runs.
        freeze_last_layer_epochs: Epochs during which the prototypes are frozen.
        clip_grad: Maximum norm of each parameter's gradient; None for no clipping. The Trainer's takes precedence.
        **options: See `MethodOptions`; ``small_images`` must be False.
    """

    base_lr: ClassVar[float] = 0.0002 / 32  # for the square root of the batch: 0.0002 at 1024
    lr_rule: ClassVar[str] = "sqrt"
    adamw_options: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.99)}
    warms_up_by_step: ClassVar[bool] = True
    backbone: MaskedViT
    momentum_backbone: MaskedViT
    encodes_whole_images: ClassVar[bool] = False
    sharded_methods: ClassVar = dict.fromkeys(("backbone", "momentum_backbone", "gram_backbone"), ("tokens",))
    default_warmup_epochs: ClassVar[int] = 100
    views = staticmethod(dinov2_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        gram_start_epoch: int = 80,
        gram_every_epochs: int = 5,
        gram_updates: int = 3,
        gram_weight: float = 2.0,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_temperature_epochs: int = 100,
        momentum: float = 0.994,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        layer_decay: float = 0.98,
        patch_lr_multiplier: float = 0.2,
        weight_decay: float = 0.04,
        warmup_epochs: int | None = None,
        freeze_last_layer_epochs: int = 5,
        clip_grad: float | None = 30.0,
        **options: Unpack[MethodOptions],
    ) -> None:
        schedules = Schedules(
            momentum=momentum,
            final_lr=0.0,
            final_weight_decay=weight_decay,
            clip_grad=clip_grad,
            freeze_last_layer_epochs=freeze_last_layer_epochs,
            warmup_teacher_temperature=warmup_teacher_temperature,
            teacher_temperature=teacher_temperature,
            warmup_teacher_temperature_epochs=warmup_teacher_temperature_epochs,
        )
        defaults = {"drop_path_rate": 0.3, "init_values": 1e-5}
        super().__init__(
            build_masked_backbone(backbone, defaults=defaults, **backbone_options(options)),
            schedules=schedules,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            lr_schedule=options.get("lr_schedule"),
        )
        check_positive("student_temperature", student_temperature, "The paper has 0.1")
        check_at_least("gram_start_epoch", gram_start_epoch, 1, "Give an epoch after the first")
        check_at_least("gram_every_epochs", gram_every_epochs, 1)
        check_at_least("gram_updates", gram_updates, 0)
        check_probability("mask_probability", mask_probability)
        check_range("mask_ratio", mask_ratio, 0, 1)
        for name, weight in (("gram", gram_weight), ("patch", patch_weight), ("koleo", koleo_weight)):
            check_not_negative(f"{name}_weight", weight)
        for name, factor in (("layer_decay", layer_decay), ("patch_lr_multiplier", patch_lr_multiplier)):
            check_positive(name, factor)
        self.gram_start_epoch, self.gram_every_epochs = gram_start_epoch, gram_every_epochs
        self.gram_updates, self.student_temperature = gram_updates, student_temperature
        self.gram_weight, self.patch_weight, self.koleo_weight = gram_weight, patch_weight, koleo_weight
        self.layer_decay, self.patch_lr_multiplier = layer_decay, patch_lr_multiplier
        self.mask_settings: dict[str, Any] = {"probability": mask_probability, "ratio": mask_ratio}
        head: HeadOptions = {"hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim}
        head |= {"num_prototypes": num_prototypes, "norm_last_layer": False}
        self.projector, self.patch_projector = (build_head("dino", self.feature_dim, **head) for _ in range(2))
        self.momentum_backbone, self.gram_backbone = teacher_of(self.backbone), teacher_of(self.backbone)
        self.momentum_projector, self.momentum_patch_projector = map(teacher_of, (self.projector, self.patch_projector))
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the sum of class-token, masked-patch, KoLeo and Gram losses, and features (B, F)."""
        views = self.batch_crops(batch, global_views=2)  # V x (B, C, h, w)
        global_views, size = join_globals(views), len(views[0])  # (2B, C, h, w)
        mask, masked, images = draw_masks(dinov2_masks, self.backbone, global_views, **self.mask_settings)
        student = self.backbone.tokens(global_views, mask=mask)  # (2B, F) and (2B, N, F)
        features = torch.cat([student.features, *forward_by_size(self.backbone, views[2:])])  # (V B, F)
        logits = self.projector(features).split(size)  # V x (B, K)
        patch_logits = self.patch_projector(gather(student.patches, masked))  # (M, K)
        with torch.no_grad():
            teacher = self.momentum_backbone.tokens(global_views)  # (2B, F) and (2B, N, F)
            targets = self.momentum_projector(teacher.features).split(size)  # 2 x (B, K)
            patch_targets = self.momentum_patch_projector(gather(teacher.patches, masked))  # (M, K)
        kind: dict[str, Any] = {"student_temperature": self.student_temperature, "centering": "sinkhorn"}
        kind["teacher_temperature"] = self.teacher_temperature
        parts = {
            "class_loss": dino_loss(logits, targets, None, **kind),
            "patch_loss": masked_patch_loss(patch_logits, patch_targets, None, images, count=2 * size, **kind),
            "koleo_loss": torch.stack([koleo_loss(view) for view in student.features.chunk(2)]).sum(),
        }
        loss = parts["class_loss"] + self.patch_weight * parts["patch_loss"] + self.koleo_weight * parts["koleo_loss"]
        if self.current_epoch >= self.gram_start_epoch:
            with torch.no_grad():
                anchors = self.gram_backbone.tokens(global_views).patches  # (2B, N, F)
            parts["gram_loss"] = gram_loss(student.patches, anchors)
            loss = loss + self.gram_weight * parts["gram_loss"]
        parts |= teacher_statistics(logits, targets, None, self.teacher_temperature, "sinkhorn")
        self.log_all({"loss": loss, **parts}, batch_size=size)
        return {"loss": loss, "features": features[:size].detach()}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Copy the teacher to the Gram teacher before the first batch of the epochs that begin with a new one."""
        super().on_train_batch_start(batch, batch_idx)
        number, rest = divmod(self.current_epoch - self.gram_start_epoch, self.gram_every_epochs)
        if batch_idx == 0 and rest == 0 and 0 <= number <= self.gram_updates:
            with full_weights(self, self.gram_backbone):
                copy_weights(self.momentum_backbone, self.gram_backbone)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (student, teacher) modules."""
        heads = (self.projector, self.momentum_projector), (self.patch_projector, self.momentum_patch_projector)
        return [(self.backbone, self.momentum_backbone), *heads]

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback."""
        return [MomentumUpdate(self.schedules.momentum, schedule="constant")]

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the share of the peak rate: linear warm-up, then constant."""
        return min(1.0, step / max(1, warmup_steps - 1)) if warmup_steps else 1.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, one per learning rate and kind of weight decay."""
        return split_by_rate(super().parameter_groups(), self.backbone, self.layer_decay, self.patch_lr_multiplier)
