"""DINOv2: DINO's and iBOT's losses with separate heads, Sinkhorn-balanced targets, and KoLeo regularization.

Papers: https://arxiv.org/abs/2304.07193, with registers https://arxiv.org/abs/2309.16588.
Reference implementation: facebookresearch/dinov2 (``ssl_meta_arch.py``), defaults of its large configuration.
Differs from it: gradients are clipped per parameter instead of per network; last layers are frozen by dropping their
gradients instead of a learning rate of 0; KoLeo searches nearest neighbors on all ranks, as in DINOv3; centers are
updated once per optimizer step, with the mean of all ranks' patches; stochastic depth grows with depth, as in timm; no
weight decay on vectors such as LayerScale; an epoch is one of the dataset (the reference's has 1,250 steps).
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_choice, check_not_negative, check_positive, check_probability, check_range
from lightning_contrast.augment import dinov2_views
from lightning_contrast.losses import dino_loss, koleo_loss, masked_patch_loss
from lightning_contrast.methods.distillation import DistillationModule
from lightning_contrast.metrics.teacher import teacher_statistics
from lightning_contrast.nn import Center, MaskedViT, build_head, build_masked_backbone
from lightning_contrast.nn.masking import dinov2_masks, draw_masks, gather, join_globals
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.distillation import Schedules
from lightning_contrast.optim.layer_decay import split_by_rate
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class DINOv2(DistillationModule):
    """Distill an EMA teacher of a vision transformer into all views and masked patches, and spread the features.

    A batch holds two global views (B, C, h, w) of one size and then any number of local views, of any size; `forward`
    gives features (B, F). ``momentum_backbone`` is the teacher, which the paper evaluates. Logs ``train/class_loss``,
    ``train/patch_loss``, ``train/koleo_loss``, and for the class tokens ``train/teacher_entropy``,
    ``train/prototype_entropy`` (nats) and ``train/agreement`` (0..1), as `DINO` does. Registers are an option of the
    backbone: ``backbone_kwargs=dict(reg_tokens=4)``, or a name with "reg4" in it.

    Args:
        backbone: "small_vit", the name of a timm ViT, or such a module: see `build_masked_backbone`. By name it accepts
            views of any size and has a drop path of 0.4 and LayerScale from 1e-5.
        num_prototypes: K, the width of the logits, also of a custom ``projector``; >= 2.
        hidden_dim: Width of the heads' hidden layers.
        bottleneck_dim: Width of the bottleneck before the prototypes.
        separate_heads: Use a separate head for patches; False is the reference's short configuration.
        patch_bottleneck_dim: Width of the bottleneck of the patches' own head.
        projector: A module (N, F) -> (N, K) that replaces the head; the teacher gets a copy.
        patch_projector: The same for patches; None builds one, or uses ``projector`` without ``separate_heads``.
        centering: "sinkhorn", or "mean" for centers as in DINO.
        mask_probability: Share of the global views that are masked.
        mask_ratio: Minimum and maximum share of their masked patches.
        patch_weight: Weight of the patches' loss, >= 0.
        koleo_weight: Weight of the KoLeo loss of the features of each global view, >= 0.
        student_temperature: Divisor of the student's logits, > 0.
        teacher_temperature: Divisor of the teacher's logits after the warm-up, > 0.
        warmup_teacher_temperature: Divisor of the teacher's logits in the first step, > 0.
        warmup_teacher_temperature_epochs: Epochs of this warm-up, which is updated every step; 0 for none.
        center_momentum: EMA momentum of the centers, in [0, 1].
        momentum: EMA momentum of the teacher at the first step, in [0, 1]; rises to 1 as a cosine.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.0002 x sqrt(global batch / 1024).
        final_lr: Learning rate at the end, absolute.
        layer_decay: Learning rate of each block as a share of the next block's; 0.9 in the short configuration.
        patch_lr_multiplier: Factor of the learning rate of the patch embedding.
        weight_decay: Weight decay at the start, of all parameters except norms and biases.
        final_weight_decay: Weight decay at the end of the cosine; 0.4 in the short configuration.
        warmup_epochs: Epochs of linear warm-up before the cosine to ``final_lr``; None is 80, fewer in short runs; the
            short configuration has 10.
        freeze_last_layer_epochs: Epochs during which the prototypes are frozen.
        clip_grad: Maximum norm of each parameter's gradient; None for no clipping. The Trainer's takes precedence.
        **options: See `MethodOptions`; ``small_images`` must be False.
    """

    base_lr: ClassVar[float] = 0.0002 / 32  # for the square root of the batch: 0.0002 at 1024
    lr_rule: ClassVar[str] = "sqrt"
    warms_up_by_step: ClassVar[bool] = True
    backbone: MaskedViT
    momentum_backbone: MaskedViT
    encodes_whole_images: ClassVar[bool] = False
    sharded_methods: ClassVar = {"backbone": ("tokens",), "momentum_backbone": ("tokens",)}
    default_warmup_epochs: ClassVar[int] = 80
    views = staticmethod(dinov2_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        num_prototypes: int = 131072,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 384,
        separate_heads: bool = True,
        patch_bottleneck_dim: int = 256,
        projector: nn.Module | None = None,
        patch_projector: nn.Module | None = None,
        centering: str = "sinkhorn",
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_temperature_epochs: int = 30,
        center_momentum: float = 0.9,
        momentum: float = 0.994,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        final_lr: float = 1e-6,
        layer_decay: float = 1.0,
        patch_lr_multiplier: float = 0.2,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.2,
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
            build_masked_backbone(
                backbone, defaults={"drop_path_rate": 0.4, "init_values": 1e-5}, **backbone_options(options)
            ),
            schedules=schedules,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            lr_schedule=options.get("lr_schedule"),
        )
        check_positive("student_temperature", student_temperature, "The paper has 0.1")
        check_choice("centering", centering, ("sinkhorn", "mean"))
        check_probability("mask_probability", mask_probability)
        check_range("mask_ratio", mask_ratio, 0, 1)
        check_not_negative("patch_weight", patch_weight)
        check_not_negative("koleo_weight", koleo_weight)
        check_positive("layer_decay", layer_decay)
        check_positive("patch_lr_multiplier", patch_lr_multiplier)
        self.student_temperature, self.centering = student_temperature, centering
        self.patch_weight, self.koleo_weight = patch_weight, koleo_weight
        self.layer_decay, self.patch_lr_multiplier = layer_decay, patch_lr_multiplier
        self.mask_settings: dict[str, Any] = {"probability": mask_probability, "ratio": mask_ratio}
        head: dict[str, Any] = {"hidden_dim": hidden_dim, "num_prototypes": num_prototypes, "norm_last_layer": False}
        self.projector = projector or build_head("dino", self.feature_dim, bottleneck_dim=bottleneck_dim, **head)
        self.patch_projector = patch_projector
        if separate_heads and patch_projector is None:
            self.patch_projector = build_head("dino", self.feature_dim, bottleneck_dim=patch_bottleneck_dim, **head)
        self.momentum_backbone, self.momentum_projector = teacher_of(self.backbone), teacher_of(self.projector)
        self.momentum_patch_projector = teacher_of(self.patch_projector) if self.patch_projector else None
        self.center, self.patch_center = (Center(num_prototypes, center_momentum) for _ in range(2))
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the sum of class-token, masked-patch and KoLeo losses, and features (B, F)."""
        views = self.batch_crops(batch, global_views=2)  # V x (B, C, h, w)
        global_views, size = join_globals(views), len(views[0])  # (2B, C, h, w)
        mask, masked_index, images = draw_masks(  # (2B, N), (M,), (M,)
            dinov2_masks, self.backbone, global_views, **self.mask_settings
        )
        student = self.backbone.tokens(global_views, mask=mask)  # (2B, F) and (2B, N, F)
        features = torch.cat([student.features, *forward_by_size(self.backbone, views[2:])])  # (V B, F)
        student_logits = self.projector(features).split(size)  # V x (B, K)
        patch_head = self.patch_projector or self.projector
        patch_logits = patch_head(gather(student.patches, masked_index))  # (M, K)
        with torch.no_grad():
            teacher = self.momentum_backbone.tokens(global_views)  # (2B, F) and (2B, N, F)
            targets = self.momentum_projector(teacher.features)  # (2B, K)
            patch_head = self.momentum_patch_projector or self.momentum_projector
            patch_targets = patch_head(gather(teacher.patches, masked_index))  # (M, K)
        teacher_logits, temperature = targets.split(size), self.teacher_temperature  # 2 x (B, K)
        has_center = self.centering == "mean"
        center = self.center(targets) if has_center else None  # (K,), as of the last step
        patch_center = self.patch_center(patch_targets) if has_center else None  # (K,)
        kind: dict[str, Any] = {"student_temperature": self.student_temperature, "centering": self.centering}
        class_loss = dino_loss(student_logits, teacher_logits, center, teacher_temperature=temperature, **kind)
        patch_loss = masked_patch_loss(
            patch_logits, patch_targets, patch_center, images, count=2 * size, teacher_temperature=temperature, **kind
        )
        koleo = torch.stack([koleo_loss(view) for view in student.features.chunk(2)]).sum()
        loss = class_loss + self.patch_weight * patch_loss + self.koleo_weight * koleo
        logged = {"loss": loss, "class_loss": class_loss, "patch_loss": patch_loss, "koleo_loss": koleo}
        statistics = teacher_statistics(student_logits, teacher_logits, center, temperature, self.centering)
        self.log_all(logged | statistics, batch_size=size)
        # MomentumUpdate moves the teacher and commits the centers after the optimizer step.
        return {"loss": loss, "features": features[:size].detach()}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (student, teacher) modules."""
        pairs = [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]
        if self.patch_projector and self.momentum_patch_projector:
            pairs.append((self.patch_projector, self.momentum_patch_projector))
        return pairs

    def step_states(self) -> list[nn.Module]:
        """Return the centers, which are updated once per optimizer step, if they are used."""
        return [self.center, self.patch_center] if self.centering == "mean" else []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, one per learning rate and kind of weight decay."""
        return split_by_rate(super().parameter_groups(), self.backbone, self.layer_decay, self.patch_lr_multiplier)
