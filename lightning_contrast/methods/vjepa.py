"""V-JEPA: predict the EMA teacher's features of hidden blocks of a clip from the visible rest.

Paper: https://arxiv.org/abs/2404.08471.
Reference implementation: facebookresearch/jepa.
Differs from it: masks are drawn in the step instead of the loader's workers; gradients are clipped from the first step,
not only after the warm-up; one clip per video; an epoch is one of the dataset (the reference's has 300 steps).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_contrast import optim
from lightning_contrast._checks import check_positive, require
from lightning_contrast.augment import vjepa_views
from lightning_contrast.losses import vjepa_loss
from lightning_contrast.methods.distillation import StretchedModule
from lightning_contrast.nn import MaskSampler, TubeletPredictor, TubeletViT, build_masks, build_tubelet_backbone
from lightning_contrast.nn.jepa_predictor import check_predictor
from lightning_contrast.nn.masking import split_masks
from lightning_contrast.nn.patch_masks import tubelet_masks
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.optim.distillation import Schedules
from lightning_contrast.precision import upcast
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class VJEPA(StretchedModule):
    """Predict the features of hidden tubelets of a clip, for short-range and for long-range masks.

    A batch holds one view (B, T, C, h, w) of the size that the backbone was built for; `forward` gives features (B, F),
    the mean of the tubelets, of clips, or of images (B, C, h, w), which are clips that stand still. Each kind of mask
    has an encoder and a predictor pass of its own; the teacher's pass, of the whole clip, is shared. Masks of a rank's
    batch are cut to the smallest number of visible and of hidden tubelets, from the end. The step's ``"features"`` are
    the mean of the visible tubelets of the first kind; ``momentum_backbone`` is the teacher, which the paper evaluates.
    Logs ``train/target_std``, the standard deviation of the targets over tubelets and clips, 0 in a collapse.

    Args:
        backbone: "small_video_vit", "video_vit_base", "video_vit_large", "video_vit_huge", or a `nn.TubeletViT`.
        short_blocks: Blocks of a short-range mask, >= 1.
        short_scale: Share of a frame of each of them, in (0, 1].
        long_blocks: Blocks of a long-range mask, >= 1.
        long_scale: Share of a frame of each of them, in (0, 1].
        aspect: Range of a block's height over its width, > 0.
        masks: Samplers ``(clips, grid, generator=None)`` of one or more kinds of masks, instead of these two.
        predictor_dim: Width of the predictor, a multiple of 4 and of its heads.
        predictor_depth: Number of the predictor's blocks.
        predictor_heads: Number of the predictor's attention heads; None is the backbone's.
        exponent: p of the loss ``|z - h|^p / p``, > 0.
        momentum: EMA momentum of the teacher at the first step, in [0, 1]; rises linearly towards 1.
        schedule_stretch: Length of the schedules as a multiple of the run, >= 1.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.000625 x global batch / 3072.
        warmup_start: Learning rate at the start of the warm-up as a share of the peak.
        final_lr: Learning rate at the end of the schedule, absolute.
        weight_decay: Weight decay at the start, of all parameters except norms and biases.
        final_weight_decay: Weight decay at the end of the cosine.
        warmup_epochs: Epochs of linear warm-up before the cosine to ``final_lr``; None is 40, fewer in short runs.
        clip_grad: Maximum norm of the gradients of the encoder, and of those of the predictor; None for no clipping.
        **options: See `MethodOptions`; ``small_images`` must be False.
    """

    base_lr: ClassVar[float] = 0.000625 / 12
    backbone: TubeletViT  # type: ignore[assignment]  # of clips
    momentum_backbone: TubeletViT  # type: ignore[assignment]
    encodes_whole_images: ClassVar[bool] = False
    sharded_methods: ClassVar = {"backbone": ("tokens",), "momentum_backbone": ("tokens",)}
    default_warmup_epochs: ClassVar[int] = 40
    views = staticmethod(vjepa_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        short_blocks: int = 8,
        short_scale: float = 0.15,
        long_blocks: int = 2,
        long_scale: float = 0.7,
        aspect: tuple[float, float] = (0.75, 1.5),
        masks: Sequence[MaskSampler] | None = None,
        predictor_dim: int = 384,
        predictor_depth: int = 12,
        predictor_heads: int | None = None,
        exponent: float = 1.0,
        momentum: float = 0.998,
        schedule_stretch: float = 1.25,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        warmup_start: float = 0.32,
        final_lr: float = 1e-6,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        warmup_epochs: int | None = None,
        clip_grad: float | None = 10.0,
        **options: Unpack[MethodOptions],
    ) -> None:
        schedules = Schedules(
            momentum=momentum,
            final_lr=final_lr,
            final_weight_decay=final_weight_decay,
            schedule_stretch=schedule_stretch,
            warmup_start=warmup_start,
            clip_grad=clip_grad,
        )
        super().__init__(
            build_tubelet_backbone(backbone, **backbone_options(options)),
            schedules=schedules,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            lr_schedule=options.get("lr_schedule"),
        )
        check_positive("exponent", exponent, "The paper has 1")
        grid = self.backbone.grid
        kinds = ((short_blocks, short_scale), (long_blocks, long_scale))
        paper = [partial(tubelet_masks, blocks=n, scale=(s, s), aspect=aspect) for n, s in kinds]
        samplers = paper if masks is None else masks
        hint = "Give None for the paper's two kinds"
        listed = isinstance(samplers, Sequence) and len(samplers) > 0
        require(listed, "masks", "be a list of at least one sampler", masks, hint)
        self.mask_samplers = [build_masks(sampler, grid) for sampler in samplers]
        self.exponent = exponent
        heads = self.backbone.heads if predictor_heads is None else predictor_heads
        check_predictor(predictor_dim, predictor_depth, heads)
        self.predictor = TubeletPredictor(
            self.feature_dim,
            grid,
            len(samplers),
            width=predictor_dim,
            depth=predictor_depth,
            heads=heads,
        )
        self.momentum_backbone = teacher_of(self.backbone)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the distance of predictions and the teacher's normalized tubelets, and features (B, F)."""
        (clips,) = self.batch_views(batch, count=1)  # (B, T, C, h, w)
        features, predictions, hidden = [], [], []
        for kind, sampler in enumerate(self.mask_samplers):
            split = split_masks(sampler(len(clips), self.backbone.grid), clips.device, cut=True)
            tokens = self.backbone.tokens(clips, keep=split.visible)  # (B, K, F)
            predictions.append(self.predictor(tokens, split.visible, split.hidden, kind))  # (B, M, F)
            features.append(upcast(tokens).mean(1))
            hidden.append(split.hidden)
        with torch.no_grad():
            target = self.momentum_backbone.tokens(clips)  # (B, N, F)
        loss = vjepa_loss(predictions, target, hidden, exponent=self.exponent)
        self.log("train/loss", loss, batch_size=len(clips))
        normalized = F.layer_norm(target.float(), target.shape[-1:])
        self.log("train/target_std", normalized.flatten(0, 1).std(0).mean(), batch_size=len(clips))
        # MomentumUpdate moves the teacher after the optimizer step.
        return {"loss": loss, "features": features[0].detach()}

    def clip(self, optimizer: Optimizer, clip_grad: float) -> None:
        """Clip the common norm of the encoder's gradients, and that of the predictor's."""
        for module in (self.backbone, self.predictor):
            optim.clip_gradients_together(module.parameters(), clip_grad)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (context encoder, target encoder); the predictor has no teacher."""
        return [(self.backbone, self.momentum_backbone)]
