"""iBOT: DINO, plus masked image modeling: the student predicts the EMA teacher's output for masked patches.

Paper: https://arxiv.org/abs/2111.07832.
Reference implementation: bytedance/ibot.
Differs from it: defaults are those of the published ViT runs, not the reference's (head shared by class tokens and
patches, both teacher temperatures from 0.04 to 0.07); student logits are computed for masked patches only, since only
they are compared; both centers are updated once per optimizer step instead of per micro-batch; positions of small views
are resampled without the reference's offset of 0.1; ViTs only (the reference also has a Swin).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_not_negative, check_positive
from lightning_contrast.augment import dino_views
from lightning_contrast.losses import dino_loss, masked_patch_loss
from lightning_contrast.methods.distillation import DistillationModule
from lightning_contrast.metrics.teacher import teacher_statistics
from lightning_contrast.nn import Center, MaskedViT, Norm, build_head, build_masked_backbone
from lightning_contrast.nn.masking import check_mask_ratios, draw_masks, gather, ibot_masks, join_globals
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.distillation import Schedules
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class IBOT(DistillationModule):
    """Distill an EMA teacher of a vision transformer into all views and into masked patches.

    A batch holds two global views (B, C, h, w) of one size and then any number of local views, of any size; `forward`
    gives features (B, F). ``momentum_backbone`` is the teacher, which the paper evaluates. Logs ``train/class_loss``,
    ``train/patch_loss``, and for the class tokens ``train/teacher_entropy``, ``train/prototype_entropy`` (nats; both 0
    in a collapse to one prototype, both ln K in one to the uniform distribution) and ``train/agreement`` (0..1).

    Args:
        backbone: "small_vit", the name of a timm ViT, or such a module: see `build_masked_backbone`. By name it accepts
            views of any size and has a drop path of 0.1.
        num_prototypes: K, the width of all logits, also of a custom ``projector``; >= 2.
        hidden_dim: Width of the head's hidden layers.
        bottleneck_dim: Width of the bottleneck before the prototypes.
        shared_head: Use the same prototypes for class tokens and patches; the layers before them are always shared.
        head_norm: Norm of the head's hidden layers, "batch", "layer" or None as in the paper.
        norm_last_layer: Keep all prototypes at length 1; False is better, but stable for small ViTs only.
        projector: A module that replaces the head, (N, F) and (M, F) -> (N, K) and (M, K) for class tokens and patches;
            the teacher gets a copy. Its ``last_layer`` and ``patch_last_layer`` are frozen in the first epochs.
        mask_ratios: Shares of masked patches; each global view draws one of them.
        mask_spreads: For each ratio, the half-width of the uniform range from which the share is drawn.
        mask_shape: "block", or "random" for single patches, which the paper uses for large ViTs.
        class_weight: Weight of the class tokens' loss, >= 0.
        patch_weight: Weight of the patches' loss, >= 0.
        student_temperature: Divisor of the student's logits, > 0.
        teacher_temperature: Divisor of the teacher's class logits after the warm-up, > 0.
        patch_teacher_temperature: Divisor of the teacher's patch logits after the warm-up, > 0.
        warmup_teacher_temperature: Divisor of both in the first epoch, > 0.
        warmup_teacher_temperature_epochs: Epochs of this warm-up; 0 for none.
        center_momentum: EMA momentum of both centers, in [0, 1].
        momentum: EMA momentum of the teacher at the first step, in [0, 1]; rises to 1 as a cosine.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.0005 x global batch / 256.
        final_lr: Learning rate at the end, absolute.
        weight_decay: Weight decay at the start, of all parameters except norms and biases.
        final_weight_decay: Weight decay at the end of the cosine.
        warmup_epochs: Epochs of linear warm-up before the cosine to ``final_lr``; None is 10, fewer in short runs.
        freeze_last_layer_epochs: Epochs during which the prototypes are frozen.
        clip_grad: Maximum norm of each parameter's gradient; None for no clipping. The Trainer's takes precedence.
        **options: See `MethodOptions`; ``small_images`` must be False.
    """

    backbone: MaskedViT
    momentum_backbone: MaskedViT
    encodes_whole_images: ClassVar[bool] = False
    sharded_methods: ClassVar = {"backbone": ("tokens",), "momentum_backbone": ("tokens",)}
    views = staticmethod(partial(dino_views, local_views=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)))

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        num_prototypes: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        shared_head: bool = True,
        head_norm: Norm = None,
        norm_last_layer: bool = True,
        projector: nn.Module | None = None,
        mask_ratios: Sequence[float] = (0.0, 0.3),
        mask_spreads: Sequence[float] = (0.0, 0.2),
        mask_shape: str = "block",
        class_weight: float = 1.0,
        patch_weight: float = 1.0,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        patch_teacher_temperature: float = 0.07,
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
            build_masked_backbone(backbone, defaults={"drop_path_rate": 0.1}, **backbone_options(options)),
            schedules=schedules,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            lr_schedule=options.get("lr_schedule"),
        )
        check_positive("student_temperature", student_temperature, "The paper has 0.1")
        check_positive("patch_teacher_temperature", patch_teacher_temperature, "The paper has 0.07")
        check_mask_ratios(mask_ratios, mask_spreads, mask_shape)
        check_not_negative("class_weight", class_weight)
        check_not_negative("patch_weight", patch_weight)
        self.student_temperature, self.patch_teacher_temperature = student_temperature, patch_teacher_temperature
        self.mask_settings: dict[str, Any] = {"ratios": mask_ratios, "spreads": mask_spreads, "shape": mask_shape}
        self.class_weight, self.patch_weight = class_weight, patch_weight
        self.projector = projector or build_head(
            "ibot",
            self.feature_dim,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            num_prototypes=num_prototypes,
            shared=shared_head,
            norm=head_norm,
            norm_last_layer=norm_last_layer,
        )
        self.momentum_backbone, self.momentum_projector = teacher_of(self.backbone), teacher_of(self.projector)
        self.center, self.patch_center = (Center(num_prototypes, center_momentum) for _ in range(2))
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the sum of class-token and masked-patch cross-entropies, and features (B, F)."""
        views = self.batch_crops(batch, global_views=2)  # V x (B, C, h, w)
        global_views, size = join_globals(views), len(views[0])  # (2B, C, h, w)
        mask, masked_index, images = draw_masks(  # (2B, N), (M,), (M,)
            ibot_masks, self.backbone, global_views, **self.mask_settings
        )
        student = self.backbone.tokens(global_views, mask=mask)  # (2B, F) and (2B, N, F)
        features = torch.cat([student.features, *forward_by_size(self.backbone, views[2:])])  # (V B, F)
        logits, patch_logits = self.projector(features, gather(student.patches, masked_index))  # (V B, K), (M, K)
        with torch.no_grad():
            teacher = self.momentum_backbone.tokens(global_views)  # (2B, F) and (2B, N, F)
            targets, patch_targets = self.momentum_projector(teacher.features, teacher.patches.flatten(0, 1))
        center, patch_center = self.center(targets), self.patch_center(patch_targets)  # (K,) each, as of the last step
        student_logits, teacher_logits = logits.split(size), targets.split(size)  # V x (B, K), 2 x (B, K)
        class_loss = dino_loss(
            student_logits,
            teacher_logits,
            center,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )
        patch_loss = masked_patch_loss(
            patch_logits,
            patch_targets.index_select(0, masked_index),
            patch_center,
            images,
            count=2 * size,
            student_temperature=self.student_temperature,
            teacher_temperature=self.warmed_up(self.patch_teacher_temperature),
        )
        loss = self.class_weight * class_loss + self.patch_weight * patch_loss
        logged = {"loss": loss, "class_loss": class_loss, "patch_loss": patch_loss}
        statistics = teacher_statistics(student_logits, teacher_logits, center, self.teacher_temperature)
        self.log_all(logged | statistics, batch_size=size)
        # MomentumUpdate moves the teacher and commits the centers after the optimizer step.
        return {"loss": loss, "features": student.features[:size].detach()}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (student, teacher) modules."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def step_states(self) -> list[nn.Module]:
        """Return the centers, which are updated once per optimizer step."""
        return [self.center, self.patch_center]
