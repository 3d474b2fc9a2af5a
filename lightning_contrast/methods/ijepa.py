"""I-JEPA: predict the EMA teacher's features of image blocks from those of a context block.

Paper: https://arxiv.org/abs/2301.08243.
Reference implementation: facebookresearch/ijepa.
Differs from it: masks are drawn in the step instead of the loader's workers (see `JepaMaskSampler`); the context
encoder has timm's initialization; the teacher is updated once per optimizer step.
"""

from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_dict, require
from lightning_contrast.augment import ijepa_views
from lightning_contrast.losses import ijepa_loss
from lightning_contrast.methods.distillation import StretchedModule
from lightning_contrast.nn import (
    BackboneOptions,
    JepaMaskSampler,
    JepaPredictor,
    MaskedViT,
    build_masked_backbone,
    select_patches,
)
from lightning_contrast.nn.jepa_masking import repeat_rows
from lightning_contrast.nn.jepa_predictor import check_predictor
from lightning_contrast.nn.small_vit import SMALL_VIT
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.distillation import Schedules
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options

_PATCHES_ONLY = {"class_token": False, "global_pool": "avg", "fc_norm": False}


class IJEPA(StretchedModule):
    """Predict the features of target blocks of patches from those of the context patches.

    A batch holds one view (B, C, h, w) of the size that the backbone was built for; `forward` gives features (B, F),
    the mean over the patches, which the paper evaluates on ``momentum_backbone``. Logs ``train/target_std``, the
    standard deviation of the targets over patches and images (0 in a collapse, at most about 1), ``train/agreement``,
    the mean cosine similarity of predictions and targets, and ``train/relaxed``, the share of images whose context was
    allowed to overlap targets. The step's ``"features"`` are the mean over the context patches.

    Args:
        backbone: ``"small_vit"``, the name of a timm vision transformer, or such a module, whose patches can be
            dropped, without class token. By name it is built as in the paper:
            ``class_token=False, global_pool="avg", fc_norm=False``.
        fixed_positions: Replace the backbone's learned positions by fixed sine-cosine positions, as in the paper.
        targets: Number of target blocks per image, >= 1.
        target_scale: Range of a target block's share of the patches, in (0, 1].
        target_aspect: Range of a target block's height over its width, > 0.
        context_scale: Range of the context block's share of the patches, in (0, 1].
        min_keep: Lower bound (exclusive) of the number of context patches, >= 0.
        contexts: Number of contexts per image, each of which predicts all targets, >= 1; 1 in the paper.
        disjoint_targets: Whether target blocks avoid each other where the grid has space; False in the paper.
        predictor_dim: Width of the predictor, a multiple of 4 and of its heads.
        predictor_depth: Number of the predictor's blocks; 12 in the paper, 6 for ViT-B.
        predictor_heads: Number of the predictor's attention heads; None is the backbone's.
        predictor: A module (tokens, context, targets) -> (B, T, N_t, F) that replaces the predictor; see
            `JepaPredictor`.
        momentum: EMA momentum of the teacher at the first step, in [0, 1]; rises linearly towards 1.
        schedule_stretch: Length of the schedules as a multiple of the run, >= 1.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.001 x global batch / 2048.
        warmup_start: Learning rate at the start of the warm-up as a share of the peak.
        final_lr: Learning rate at the end of the schedule, absolute.
        weight_decay: Weight decay at the start, of all parameters except norms and biases.
        final_weight_decay: Weight decay at the end of the cosine.
        warmup_epochs: Epochs of linear warm-up before the cosine to ``final_lr``; None is 40, fewer in short runs.
        **options: See `MethodOptions`; ``small_images`` must be False.
    """

    base_lr: ClassVar[float] = 0.000125
    encodes_whole_images: ClassVar[bool] = False
    sharded_methods: ClassVar = {"backbone": ("tokens",), "momentum_backbone": ("tokens",)}
    default_warmup_epochs: ClassVar[int] = 40
    views = staticmethod(ijepa_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        fixed_positions: bool = True,
        targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_keep: int = 10,
        contexts: int = 1,
        disjoint_targets: bool = False,
        predictor_dim: int = 384,
        predictor_depth: int = 12,
        predictor_heads: int | None = None,
        predictor: nn.Module | None = None,
        momentum: float = 0.996,
        schedule_stretch: float = 1.0,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        warmup_start: float = 0.2,
        final_lr: float = 1e-6,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        schedules = Schedules(
            momentum=momentum,
            final_lr=final_lr,
            final_weight_decay=final_weight_decay,
            schedule_stretch=schedule_stretch,
            warmup_start=warmup_start,
        )
        super().__init__(
            build_masked_backbone(backbone, mask_token=False, **_patches_only(backbone, backbone_options(options))),
            schedules=schedules,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            lr_schedule=options.get("lr_schedule"),
        )
        _check_patches_only(self.backbone)
        vit, grid = self.backbone.vit, self.backbone.own_grid
        self.mask_sampler = JepaMaskSampler(
            grid,
            targets=targets,
            target_scale=target_scale,
            target_aspect=target_aspect,
            context_scale=context_scale,
            min_keep=min_keep,
            contexts=contexts,
            disjoint_targets=disjoint_targets,
        )
        if fixed_positions:
            self.backbone.fix_positions()
        heads = vit.blocks[0].attn.num_heads if predictor_heads is None else predictor_heads
        check_predictor(predictor_dim, predictor_depth, heads)
        self.predictor = predictor or JepaPredictor(
            self.feature_dim, grid, width=predictor_dim, depth=predictor_depth, heads=heads
        )
        self.momentum_backbone = teacher_of(self.backbone)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the smooth L1 loss of predictions and the teacher's normalized patches, and features (B, F)."""
        (images,) = self.batch_views(batch, count=1)  # (B, C, h, w)
        self.backbone.check_grid(images)
        masks = self.mask_sampler(len(images)).to(images.device)
        count = masks.context.shape[1] if masks.context.ndim == 3 else 1  # C contexts per image
        kept = masks.context.reshape(count * len(images), -1)  # (C B, N_c): C contexts of an image are C images
        context = self.backbone.tokens(repeat_rows(images, count), keep=kept)  # (C B, F) and (C B, N_c, F)
        prediction = self.predictor(context.patches, kept, repeat_rows(masks.targets, count))  # (C B, T, N_t, F)
        with torch.no_grad():
            patches = self.momentum_backbone.tokens(images).patches  # (B, N, F)
            target = repeat_rows(select_patches(patches, masks.targets), count)  # (C B, T, N_t, F)
        loss = ijepa_loss(prediction, target)
        self.log("train/loss", loss, batch_size=len(images))
        self._log_statistics(prediction, target, batch_size=len(images))
        self.log("train/relaxed", masks.relaxed.float().mean().item(), batch_size=len(images))  # on the host
        # MomentumUpdate moves the teacher after the optimizer step.
        return {"loss": loss, "features": context.features[::count].detach()}

    @torch.no_grad()
    def _log_statistics(self, prediction: Tensor, target: Tensor, batch_size: int) -> None:
        """Log collapse indicators of predictions and targets, (B, T, N_t, F)."""
        normalized = F.layer_norm(target.float(), target.shape[-1:])
        self.log("train/target_std", normalized.flatten(0, -2).std(0).mean(), batch_size=batch_size)
        agreement = F.cosine_similarity(prediction.float(), normalized, dim=-1).mean()
        self.log("train/agreement", agreement, batch_size=batch_size)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (context encoder, target encoder); the predictor has no teacher."""
        return [(self.backbone, self.momentum_backbone)]


def _patches_only(backbone: str | nn.Module, options: BackboneOptions) -> BackboneOptions:
    """Return the options of a vision transformer by name without class token; other names fail when they are built."""
    is_vit = isinstance(backbone, str) and backbone.startswith(("vit_", "deit", SMALL_VIT))
    if not is_vit or "distilled" in str(backbone):
        return options
    return {**options, "backbone_kwargs": _PATCHES_ONLY | check_dict("backbone_kwargs", options.get("backbone_kwargs"))}


def _check_patches_only(backbone: MaskedViT) -> None:
    """Refuse a network whose features are not the mean of its patches, since parts of it would not be trained."""
    vit = backbone.vit
    plain = vit.num_prefix_tokens == 0 and vit.global_pool == "avg" and not backbone.pools_with_parts
    rule = "average its patches, without class or register tokens and without a norm after the mean"
    found = f"{type(vit).__name__} with {vit.num_prefix_tokens} such tokens and global_pool={vit.global_pool!r}"
    hint = 'Build it with class_token=False, global_pool="avg" and fc_norm=False'
    require(plain, "backbone", rule, found, hint)
