"""MSN: a masked view matches the EMA teacher's prototype assignment of another view of the image.

Paper: https://arxiv.org/abs/2204.07141.
Reference implementation: facebookresearch/msn.
Differs from it: gradients of the prototypes are averaged over ranks instead of summed; patches are dropped from the
random anchor views only, even if focal views have the same size; the teacher is updated once per optimizer step.
"""

import math
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_interval, check_not_negative, check_positive, require
from lightning_contrast.augment import msn_views
from lightning_contrast.losses import msn_loss
from lightning_contrast.methods.distillation import StretchedModule
from lightning_contrast.metrics.teacher import teacher_statistics
from lightning_contrast.nn import Norm, build_head, build_masked_backbone
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.distillation import Schedules
from lightning_contrast.precision import full_precision
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class MSN(StretchedModule):
    """Match masked views to the EMA teacher's output for the unmasked image, with learned prototypes.

    A batch holds the target view (B, C, h, w), ``random_views`` anchor views of the same kind, and then any number of
    focal views (or none), of any size; `forward` gives features (B, F). Logs ``train/teacher_entropy``,
    ``train/prototype_entropy`` (nats; both 0 in a collapse to one prototype, both ln K in a collapse to the uniform
    distribution) and ``train/agreement`` of the first anchor view and the target (0..1). The step's ``"features"`` are
    those of the first anchor view, the first one that the student processes.

    Args:
        backbone: ``"small_vit"``, the name of a timm vision transformer, or such a module, whose patches can be
            dropped. By name it accepts views of any size.
        random_views: Number of masked anchor views, >= 1.
        patch_drop: Share of their patches that are dropped, in [0, 1), the same for the whole batch; 0.15 for ViT-S and
            ViT-B, 0.7 for ViT-L.
        num_prototypes: K, the number of prototypes, >= 2.
        hidden_dim: Width of the projector's hidden layers.
        projection_dim: Width of projections and prototypes, also of a custom ``projector``.
        head_norm: Norm of the projector's hidden layers, "batch" as in the paper, "layer" or None.
        projector: A module (N, F) -> (N, D) that replaces the head; the teacher gets a copy.
        temperature: Divisor of the cosine similarities, > 0.
        target_sharpen_temperature: Sharpen the targets by raising them to the power of 1 over it, > 0.
        me_max_weight: Weight of the mean-entropy maximization, >= 0.
        sinkhorn: Balance the targets with 3 Sinkhorn iterations.
        momentum: EMA momentum of the teacher at the first step, in [0, 1]; rises linearly towards 1.
        schedule_stretch: Length of the schedules as a multiple of the run, >= 1.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.001 x global batch / 1024.
        warmup_start: Learning rate at the start of the warm-up as a share of the peak.
        final_lr: Learning rate at the end of the schedule, absolute.
        weight_decay: Weight decay at the start, of all parameters except norms, biases and prototypes.
        final_weight_decay: Weight decay at the end of the cosine.
        warmup_epochs: Epochs of linear warm-up before the cosine to ``final_lr``; None is 15, fewer in short runs.
        clip_grad: Maximum common norm of the gradients of backbone and projector; None for no clipping. A
            ``gradient_clip_val`` of the Trainer takes precedence.
        **options: See `MethodOptions`; ``small_images`` must be False.
    """

    base_lr: ClassVar[float] = 0.00025
    encodes_whole_images: ClassVar[bool] = False
    sharded_methods: ClassVar = {"backbone": ("tokens",)}
    default_warmup_epochs: ClassVar[int] = 15
    views = staticmethod(msn_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        random_views: int = 1,
        patch_drop: float = 0.15,
        num_prototypes: int = 1024,
        hidden_dim: int = 2048,
        projection_dim: int = 256,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        temperature: float = 0.1,
        target_sharpen_temperature: float = 0.25,
        me_max_weight: float = 1.0,
        sinkhorn: bool = True,
        momentum: float = 0.996,
        schedule_stretch: float = 1.25,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        warmup_start: float = 0.2,
        final_lr: float = 1e-6,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        warmup_epochs: int | None = None,
        clip_grad: float | None = 3.0,
        **options: Unpack[MethodOptions],
    ) -> None:
        schedules = Schedules(
            momentum=momentum,
            final_lr=final_lr,
            final_weight_decay=final_weight_decay,
            clip_grad=clip_grad,
            schedule_stretch=schedule_stretch,
            warmup_start=warmup_start,
        )
        super().__init__(
            build_masked_backbone(backbone, mask_token=False, **backbone_options(options)),
            schedules=schedules,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            lr_schedule=options.get("lr_schedule"),
        )
        check_at_least("random_views", random_views, 1, "One view must be masked")
        check_interval("patch_drop", patch_drop, "[0, 1)", "Leave some patches")
        check_positive("temperature", temperature, "The paper has 0.1")
        check_positive("target_sharpen_temperature", target_sharpen_temperature, "The paper has 0.25")
        check_not_negative("me_max_weight", me_max_weight)
        self.random_views, self.patch_drop = random_views, patch_drop
        self.loss_settings: dict[str, Any] = {
            "temperature": temperature,
            "target_sharpen_temperature": target_sharpen_temperature,
            "me_max_weight": me_max_weight,
            "sinkhorn": sinkhorn,
        }
        self.projector = projector or build_head(
            "msn", self.feature_dim, hidden_dim=hidden_dim, out_dim=projection_dim, norm=head_norm
        )
        self.prototypes = _Prototypes(projection_dim, num_prototypes)
        self.momentum_backbone, self.momentum_projector = teacher_of(self.backbone), teacher_of(self.projector)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the cross-entropy of anchors and target plus the mean-entropy term, and features (B, F)."""
        target_view, *views = self.batch_crops(batch, 1 + self.random_views)  # V + 1 of (B, C, h, w)
        random, focal = views[: self.random_views], views[self.random_views :]
        embedded = forward_by_size(self._embed_masked, random) + forward_by_size(self._embed, focal)  # V of (B, F + D)
        anchors = torch.cat(embedded)[:, self.feature_dim :]  # (V B, D)
        with torch.no_grad():
            target = self.momentum_projector(self.momentum_backbone(target_view))  # (B, D)
        prototypes = self.prototypes()  # (K, D)
        loss = msn_loss(anchors, target, prototypes, **self.loss_settings)
        self.log("train/loss", loss, batch_size=len(target))
        self._log_statistics(anchors[: len(target)], target, prototypes)
        # MomentumUpdate moves the teacher after the optimizer step.
        return {"loss": loss, "features": embedded[0][:, : self.feature_dim].detach()}

    def _embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return features and projections, (N, F + D), of images (N, C, h, w) of one size.

        ``keep``, (N, K), selects patches as in `MaskedViT.tokens`.
        As in the reference implementation, the projector processes views of one size together, so its BatchNorm has
        separate statistics per size.
        """
        features = self.backbone.tokens(images, keep=keep).features  # (N, F)
        return torch.cat([features, self.projector(features)], dim=1)

    def _embed_masked(self, images: Tensor) -> Tensor:
        """Return features and projections, (N, F + D), computed from a random subset of the patches."""
        rows, columns = self.backbone.grid_size(images)
        count = math.floor(rows * columns * (1 - self.patch_drop))
        rule = f"leave one of the {rows * columns} patches"
        require(count >= 1, "patch_drop", rule, self.patch_drop, "Lower it, or make larger views")
        keep = torch.randperm(rows * columns, device=images.device)[:count]
        return self._embed(images, keep.expand(len(images), -1))

    @full_precision
    @torch.no_grad()
    def _log_statistics(self, anchors: Tensor, target: Tensor, prototypes: Tensor) -> None:
        """Log collapse indicators of anchors and targets, (B, D)."""
        rows = F.normalize(prototypes, dim=1).T / self.loss_settings["temperature"]
        student, teacher = (F.normalize(view, dim=1) @ rows for view in (anchors, target))  # (B, K)
        sharpen = self.loss_settings["target_sharpen_temperature"]
        center = teacher.new_zeros(teacher.shape[1])
        for name, value in teacher_statistics([student, student], [teacher, teacher], center, sharpen).items():
            self.log(f"train/{name}", value, batch_size=len(target))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups; norms, biases and prototypes never have weight decay."""
        decayed, others = super().parameter_groups()
        moved = [parameter for parameter in decayed["params"] if parameter is self.prototypes.weight]
        kept = [parameter for parameter in decayed["params"] if parameter is not self.prototypes.weight]
        return [decayed | {"params": kept}, others | {"params": others["params"] + moved}]

    def encoder(self) -> list[nn.Module]:
        """Return the modules that ``clip_grad`` applies to: backbone and projector."""
        return [self.backbone, self.projector]

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (student, teacher) modules; the prototypes have no teacher."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]


class _Prototypes(nn.Module):
    """Prototypes (K, D), which the loss normalizes; returned by ``forward`` so that FSDP gathers their shards."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        check_at_least("projection_dim", dim, 1)
        check_at_least("num_prototypes", count, 2, "With one prototype all assignments are equal")
        self.weight = nn.Parameter(torch.empty(count, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self) -> Tensor:
        """Return the prototypes (K, D)."""
        return self.weight.clone()
