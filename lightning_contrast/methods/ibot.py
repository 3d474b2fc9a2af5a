"""iBOT: DINO, whose student also predicts the teacher's view of the patches that are masked for it.

Paper: https://arxiv.org/abs/2111.07832.
Reference program: bytedance/ibot.
Differs from it: arguments have the values of the published runs of ViTs, not the program's defaults (head shared by
class tokens and patches, both teacher temperatures from 0.04 to 0.07); student logits are made of masked patches only,
since only they are compared; both centres move once per optimizer step, not per micro-batch of an accumulation;
positions of small views are resampled without the program's offset of 0.1; ViTs only (the program has a Swin too).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_not_negative, check_positive
from lightning_contrast.losses import dino_loss, masked_patch_loss
from lightning_contrast.methods.base import require_crops
from lightning_contrast.methods.distillation import MaskedDistillationModule
from lightning_contrast.metrics.teacher import teacher_statistics
from lightning_contrast.nn import Center, Norm, check_mask_ratios, ibot_head, ibot_masks
from lightning_contrast.nn.masking import draw_masks, join_globals, pick
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.schedules import warmed_up


class IBOT(MaskedDistillationModule):
    """Distil a moving average of a vision transformer into all views, and into masked patches.

    A batch holds two global views (B, C, h, w) of one size and then any number of local ones, of any size; `forward`
    gives features (B, F). ``momentum_backbone`` is the teacher, which the paper evaluates. Logs ``train/class_loss``,
    ``train/patch_loss``, and of the class tokens ``train/teacher_entropy``, ``train/prototype_entropy`` (nats; both 0
    in a collapse to one prototype, both ln K in one to the uniform distribution) and ``train/agreement`` (0..1).

    Args:
        backbone: "small_vit", the name of a timm ViT, or such a module: see `build_masked_backbone`. By name it takes
            views of any size and drops paths at 0.1.
        small_images: Must be False; a small patch is chosen by ``backbone_kwargs``.
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`, such as ``img_size=32, patch_size=4``.
        prototypes: K, the width of all logits, also of a ``projector`` of your own; >= 2.
        hidden_dim: Width of the head's hidden layers.
        bottleneck_dim: Width of what the prototypes are compared with.
        shared_head: Let patches share the prototypes of class tokens; they share the layers before them anyway.
        head_norm: Norm of the head's hidden layers, "batch", "layer" or None as in the paper.
        norm_last_layer: Keep all prototypes at length 1; False is better and safe for small ViTs only.
        projector: A module in the place of the head, (N, F) and (M, F) -> (N, K) and (M, K) for class tokens and
            patches; the teacher gets a copy. Its ``last_layer`` and ``patch_last_layer`` are what is frozen at first.
        mask_ratios: Shares of masked patches; each global view draws one of them.
        mask_spreads: For each ratio, how far the share is drawn around it.
        mask_shape: "block", or "random" for patches anywhere, which the paper takes for large ViTs.
        class_weight: Weight of the class tokens' loss, >= 0.
        patch_weight: Weight of the patches' loss, >= 0.
        student_temperature: Divisor of the student's logits, > 0.
        teacher_temperature: Divisor of the teacher's class logits after the warm-up, > 0.
        patch_teacher_temperature: Divisor of the teacher's patch logits after the warm-up, > 0.
        teacher_temperature_start: Both in the first epoch, > 0.
        teacher_temperature_epochs: Epochs of this warm-up; 0 for none.
        center_momentum: Share of both centres that a step keeps, in [0, 1].
        momentum: Share of the teacher that the first step keeps, in [0, 1]; it rises to 1 as a cosine.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Learning rate after the warm-up, absolute; None is the paper's 0.0005 x global batch / 256.
        final_lr: Learning rate at the end, absolute.
        weight_decay: At the start, of all parameters but norms and biases.
        final_weight_decay: The same at the end, reached as a cosine.
        warmup_epochs: Epochs of linear warm-up before the cosine to ``final_lr``.
        freeze_last_layer_epochs: Epochs in which the prototypes keep their weights.
        clip_grad: Largest norm of each parameter's gradient; None for no clipping. The Trainer's own clipping wins.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        prototypes: int = 8192,
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
        teacher_temperature_start: float = 0.04,
        teacher_temperature_epochs: int = 30,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        final_lr: float = 1e-6,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        warmup_epochs: int = 10,
        freeze_last_layer_epochs: int = 1,
        clip_grad: float | None = 3.0,
    ) -> None:
        super().__init__(
            backbone,
            small_images=small_images,
            feature_dim=feature_dim,
            backbone_kwargs=backbone_kwargs,
            defaults={"drop_path_rate": 0.1},
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
        self.set_temperatures(
            student_temperature, teacher_temperature, teacher_temperature_start, teacher_temperature_epochs
        )
        check_positive("patch_teacher_temperature", patch_teacher_temperature, "The paper has 0.07")
        check_mask_ratios(mask_ratios, mask_spreads, mask_shape)
        check_not_negative("class_weight", class_weight)
        check_not_negative("patch_weight", patch_weight)
        self.patch_temperatures = (teacher_temperature_start, patch_teacher_temperature, teacher_temperature_epochs)
        self.mask_settings: dict[str, Any] = {"ratios": mask_ratios, "spreads": mask_spreads, "shape": mask_shape}
        self.class_weight, self.patch_weight = class_weight, patch_weight
        self.projector = projector or ibot_head(
            self.feature_dim,
            hidden_dim,
            bottleneck_dim,
            prototypes,
            shared=shared_head,
            norm=head_norm,
            norm_last_layer=norm_last_layer,
        )
        self.momentum_backbone, self.momentum_projector = teacher_of(self.backbone), teacher_of(self.projector)
        self.center, self.patch_center = (Center(prototypes, center_momentum) for _ in range(2))
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the cross entropy with the teacher's other global views plus that with its masked patches."""
        views = require_crops(self, batch)  # V x (B, C, h, w)
        whole = join_globals(views)  # (2B, C, h, w)
        mask, rows, images = draw_masks(ibot_masks, self.backbone, whole, **self.mask_settings)  # (2B, N), (M,), (M,)
        seen = self.backbone.tokens(whole, mask=mask)  # (2B, F) and (2B, N, F)
        features = torch.cat([seen.features, *forward_by_size(self.backbone, views[2:])])  # (V B, F)
        logits, patches = self.projector(features, pick(seen.patches, rows))  # (V B, K), (M, K)
        with torch.no_grad():
            known = self.momentum_backbone.tokens(whole)  # (2B, F) and (2B, N, F)
            targets, patch_targets = self.momentum_projector(known.features, known.patches.flatten(0, 1))
        center, patch_center = self.center(targets), self.patch_center(patch_targets)  # as the last step left them
        student, teacher = logits.split(len(views[0])), targets.split(len(views[0]))  # V x (B, K), 2 x (B, K)
        temperature = self.teacher_temperature
        class_loss = dino_loss(
            student,
            teacher,
            center,
            student_temperature=self.student_temperature,
            teacher_temperature=temperature,
        )
        patch_loss = masked_patch_loss(
            patches,
            patch_targets.index_select(0, rows),
            patch_center,
            images,
            count=len(whole),
            student_temperature=self.student_temperature,
            teacher_temperature=warmed_up(self.current_epoch, *self.patch_temperatures),
        )
        loss = self.class_weight * class_loss + self.patch_weight * patch_loss
        logged = {"loss": loss, "class_loss": class_loss, "patch_loss": patch_loss}
        self.log_all(logged | teacher_statistics(student, teacher, center, temperature), len(views[0]))
        return {"loss": loss, "features": seen.features[: len(views[0])].detach()}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the student's parts with those of the teacher."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def step_states(self) -> list[nn.Module]:
        """Return the centres, which move once per optimizer step."""
        return [self.center, self.patch_center]
