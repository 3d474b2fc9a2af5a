"""DINOv2: DINO's and iBOT's losses with heads of their own, balanced targets, and a spread of the features.

Papers: https://arxiv.org/abs/2304.07193, with registers https://arxiv.org/abs/2309.16588.
Reference program: facebookresearch/dinov2 (``ssl_meta_arch.py``), defaults of its large configuration.
Differs from it: gradients are clipped each on its own and not for each network; the last layers are frozen by dropping
their gradients and not by a rate of 0; the nearest neighbours of KoLeo are searched on all ranks, as in DINOv3; centres
move once per optimizer step, with the mean of all ranks' patches; stochastic depth grows with depth, as timm has it;
vectors such as LayerScale carry no weight decay; an epoch is one of the data, where the program's has 1,250 steps.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_choice, check_not_negative, check_positive, check_probability, check_range
from lightning_contrast.losses import dino_loss, koleo_loss, masked_patch_loss
from lightning_contrast.methods.base import require_crops
from lightning_contrast.methods.distillation import MaskedDistillationModule
from lightning_contrast.metrics.teacher import teacher_statistics
from lightning_contrast.nn import Center, dino_head, dinov2_masks
from lightning_contrast.nn.masking import draw_masks, join_globals, pick
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.layer_decay import apply_rates, split_by_rate


class DINOv2(MaskedDistillationModule):
    """Distil a moving average of a vision transformer into all views and into masked patches, and spread the features.

    A batch holds two global views (B, C, h, w) of one size and then any number of local ones, of any size; `forward`
    gives features (B, F). ``momentum_backbone`` is the teacher, which the paper evaluates. Logs ``train/class_loss``,
    ``train/patch_loss``, ``train/koleo_loss``, and of the class tokens ``train/teacher_entropy``,
    ``train/prototype_entropy`` (nats) and ``train/agreement`` (0..1), as `DINO` does. Registers come with the backbone:
    ``backbone_kwargs=dict(reg_tokens=4)``, or a name with "reg4" in it.

    Args:
        backbone: "small_vit", the name of a timm ViT, or such a module: see `build_masked_backbone`. By name it takes
            views of any size, drops paths at 0.4 and has LayerScale from 1e-5 on.
        small_images: Must be False; a small patch is chosen by ``backbone_kwargs``.
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`, such as ``init_values`` (LayerScale).
        prototypes: K, the width of the logits, also of a ``projector`` of your own; >= 2.
        hidden_dim: Width of the heads' hidden layers.
        bottleneck_dim: Width of what the prototypes are compared with.
        separate_heads: Give patches a head of their own; False is the program's short configuration.
        patch_bottleneck_dim: Width of the bottleneck of the patches' own head.
        projector: A module (N, F) -> (N, K) in the place of the head; the teacher gets a copy.
        patch_projector: The same for patches; None: one is built, or without ``separate_heads`` it is ``projector``.
        centering: "sinkhorn", or "mean" for centres as in DINO.
        mask_probability: Share of the global views that are masked.
        mask_ratio: Smallest and largest share of their masked patches.
        patch_weight: Weight of the patches' loss, >= 0.
        koleo_weight: Weight of the spread of the features of each global view, >= 0.
        student_temperature: Divisor of the student's logits, > 0.
        teacher_temperature: Divisor of the teacher's logits after the warm-up, > 0.
        teacher_temperature_start: The same in the first step, > 0.
        teacher_temperature_epochs: Epochs of this warm-up, which goes on in every step; 0 for none.
        center_momentum: Share of the centres that a step keeps, in [0, 1].
        momentum: Share of the teacher that the first step keeps, in [0, 1]; it rises to 1 as a cosine.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Learning rate after the warm-up, absolute; None is the paper's 0.0002 x sqrt(global batch / 1024).
        final_lr: Learning rate at the end, absolute.
        layer_decay: Rate of each block as a share of the next one's; 0.9 in the short configuration.
        patch_lr_multiplier: Factor of the rate of the cut into patches.
        weight_decay: At the start, of all parameters but norms and biases.
        final_weight_decay: The same at the end, reached as a cosine; 0.4 in the short configuration.
        warmup_epochs: Epochs of linear warm-up before the cosine to ``final_lr``; 10 in the short configuration.
        freeze_last_layer_epochs: Epochs in which the prototypes keep their weights.
        clip_grad: Largest norm of each parameter's gradient; None for no clipping. The Trainer's own clipping wins.
    """

    base_lr: ClassVar[float] = 0.0002 / 32  # for the root of the batch: 0.0002 at 1024
    lr_rule: ClassVar[str] = "sqrt"
    warms_up_by_step: ClassVar[bool] = True

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        prototypes: int = 131072,
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
        teacher_temperature_start: float = 0.04,
        teacher_temperature_epochs: int = 30,
        center_momentum: float = 0.9,
        momentum: float = 0.994,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        final_lr: float = 1e-6,
        layer_decay: float = 1.0,
        patch_lr_multiplier: float = 0.2,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.2,
        warmup_epochs: int = 80,
        freeze_last_layer_epochs: int = 1,
        clip_grad: float | None = 3.0,
    ) -> None:
        super().__init__(
            backbone,
            small_images=small_images,
            feature_dim=feature_dim,
            backbone_kwargs=backbone_kwargs,
            defaults={"drop_path_rate": 0.4, "init_values": 1e-5},
            momentum=momentum,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
        )
        self.set_schedules(
            final_lr=final_lr,
            final_weight_decay=final_weight_decay,
            clip_grad=clip_grad,
            freeze_last_layer_epochs=freeze_last_layer_epochs,
        )
        warmup = teacher_temperature_start, teacher_temperature_epochs
        self.set_temperatures(student_temperature, teacher_temperature, *warmup)
        check_choice("centering", centering, ("sinkhorn", "mean"))
        check_probability("mask_probability", mask_probability)
        check_range("mask_ratio", mask_ratio, 0, 1)
        check_not_negative("patch_weight", patch_weight)
        check_not_negative("koleo_weight", koleo_weight)
        check_positive("layer_decay", layer_decay)
        check_positive("patch_lr_multiplier", patch_lr_multiplier)
        self.centering, self.patch_weight, self.koleo_weight = centering, patch_weight, koleo_weight
        self.layer_decay, self.patch_lr_multiplier = layer_decay, patch_lr_multiplier
        self.mask_settings: dict[str, Any] = {"probability": mask_probability, "ratio": mask_ratio}
        head: dict[str, Any] = {"hidden_dim": hidden_dim, "prototypes": prototypes, "norm_last_layer": False}
        self.projector = projector or dino_head(self.feature_dim, bottleneck_dim=bottleneck_dim, **head)
        if separate_heads and patch_projector is None:
            patch_projector = dino_head(self.feature_dim, bottleneck_dim=patch_bottleneck_dim, **head)
        self.patch_projector = patch_projector
        self.momentum_backbone, self.momentum_projector = teacher_of(self.backbone), teacher_of(self.projector)
        self.momentum_patch_projector = teacher_of(self.patch_projector) if self.patch_projector else None
        self.center, self.patch_center = Center(prototypes, center_momentum), Center(prototypes, center_momentum)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the cross entropies with the teacher's other global views and masked patches, and the spread."""
        views = require_crops(self, batch)  # V x (B, C, h, w)
        whole, size = join_globals(views), len(views[0])  # (2B, C, h, w)
        mask, rows, images = draw_masks(dinov2_masks, self.backbone, whole, **self.mask_settings)  # (2B, N), (M,), (M,)
        seen = self.backbone.tokens(whole, mask=mask)  # (2B, F) and (2B, N, F)
        features = torch.cat([seen.features, *forward_by_size(self.backbone, views[2:])])  # (V B, F)
        student = self.projector(features).split(size)  # V x (B, K)
        patches = (self.patch_projector or self.projector)(pick(seen.patches, rows))  # (M, K)
        with torch.no_grad():
            known = self.momentum_backbone.tokens(whole)  # (2B, F) and (2B, N, F)
            logits = self.momentum_projector(known.features)  # (2B, K)
            patch_head = self.momentum_patch_projector or self.momentum_projector
            patch_logits = patch_head(pick(known.patches, rows))  # (M, K)
        teacher, temperature = logits.split(size), self.teacher_temperature  # 2 x (B, K)
        is_centred = self.centering == "mean"
        center = self.center(logits) if is_centred else None  # (K,), as the last step left it
        patch_center = self.patch_center(patch_logits) if is_centred else None  # (K,)
        kind: dict[str, Any] = {"student_temperature": self.student_temperature, "centering": self.centering}
        class_loss = dino_loss(student, teacher, center, teacher_temperature=temperature, **kind)
        patch_loss = masked_patch_loss(
            patches, patch_logits, patch_center, images, count=2 * size, teacher_temperature=temperature, **kind
        )
        spread = torch.stack([koleo_loss(view) for view in seen.features.chunk(2)]).sum()
        loss = class_loss + self.patch_weight * patch_loss + self.koleo_weight * spread
        logged = {"loss": loss, "class_loss": class_loss, "patch_loss": patch_loss, "koleo_loss": spread}
        self.log_all(logged | teacher_statistics(student, teacher, center, temperature, self.centering), size)
        return {"loss": loss, "features": features[:size].detach()}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the student's parts with those of the teacher."""
        pairs = [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]
        if self.patch_projector and self.momentum_patch_projector:
            pairs.append((self.patch_projector, self.momentum_patch_projector))
        return pairs

    def step_states(self) -> list[nn.Module]:
        """Return the centres, which move once per optimizer step, where there are any."""
        return [self.center, self.patch_center] if self.centering == "mean" else []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, one for each rate and kind of decay."""
        return split_by_rate(super().parameter_groups(), self.backbone, self.layer_decay, self.patch_lr_multiplier)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule, with a rate of its own for each layer."""
        configured = super().configure_optimizers()
        apply_rates(configured)
        return configured
