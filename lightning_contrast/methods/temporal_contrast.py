"""Temporal contrast on clips: TCLR's instance, local-local and global-local losses; CVRL is the first one alone.

Papers: https://arxiv.org/abs/2101.07974 (TCLR), https://arxiv.org/abs/2008.03800 (CVRL).
Reference implementations: DAVEISHAN/TCLR, tensorflow/models (official/projects/video_ssl).
Differs from them: sums and means cover the videos of all ranks; a cosine schedule, where TCLR divides the learning rate
at plateaus; CVRL's loss is the mean over 2N anchors, half of the reference's sum of two means.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_positive, check_weights
from lightning_contrast.augment import clip_views
from lightning_contrast.losses import nt_xent, tclr_global_local_loss, tclr_instance_loss, tclr_local_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, build_clip_backbone, build_head, clip_steps, project_moments, time_mean
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class TemporalContrast(SelfSupervisedModule):
    """Contrast clips with those of other videos, and moments of a video with its other moments.

    A batch holds the views of `augment.clip_views`, each (B, T, C, h, w): two global clips, and unless both temporal
    weights are 0, J local clips of the first and J of the second augmentation. `forward` gives features (B, F) of
    clips, the mean over time; images (B, C, H, W) are clips of one frame, which only the instance loss can train on.

    Args:
        backbone: "r3d_18", "mc3_18", "r2plus1d_18", "small_video_convnet" or a `nn.VideoBackbone`; or what maps images
            (B, C, H, W) to features (B, F), for each frame: the name of a timm model or a module.
        head_norm: Norm of the projector's layers, "batch", "layer" or None.
        projection_dim: D, the width of the projection.
        projector: A module (B, F) -> (B, D) that replaces TCLR's head; CVRL's is ``nn.build_head("cvrl", F)``.
        local_clips: J, local clips of each augmentation, >= 2; that of the views. A global clip needs a multiple of J
            time steps after the backbone.
        instance_weight: Weight of the contrast with other videos, of global clips and of any local ones, >= 0.
        local_weight: Weight of the contrast between the local clips of a video, >= 0.
        global_local_weight: Weight of the contrast between time steps of the global clip and local clips, >= 0.
        temperature: Divisor of the cosine similarities, > 0.
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable. TCLR has Adam, CVRL SGD.
        lr: Peak learning rate, absolute; None is TCLR's 0.001 x global batch / 40.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: See `MethodOptions`, and `nn.build_clip_backbone`.
    """

    base_lr: ClassVar[float] = 1e-3 * 256 / 40
    views = staticmethod(clip_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        head_norm: Norm = "batch",
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        local_clips: int = 4,
        instance_weight: float = 1.0,
        local_weight: float = 1.0,
        global_local_weight: float = 1.0,
        temperature: float = 0.1,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = 1e-3,
        weight_decay: float = 1e-9,
        warmup_epochs: int = 5,
        **options: Unpack[MethodOptions],
    ) -> None:
        net = build_clip_backbone(backbone, **backbone_options(options))
        super().__init__(
            net, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_at_least("local_clips", local_clips, 2, "A moment needs another one; set both temporal weights to 0")
        self.weights = {"instance": instance_weight, "local": local_weight, "global_local": global_local_weight}
        check_weights(**{f"{name}_weight": weight for name, weight in self.weights.items()})
        check_positive("temperature", temperature, "TCLR and CVRL have 0.1")
        self.temperature, self.local_clips = temperature, local_clips
        self.projector = projector or build_head("tclr", self.feature_dim, out_dim=projection_dim, norm=head_norm)
        self.save_hyperparameters()

    def forward(self, clips: Tensor) -> Tensor:
        """Return the features (B, F) of clips (B, T, C, H, W) or images (B, C, H, W)."""
        return time_mean(clip_steps(self.backbone, clips))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the weighted sum of the losses, and features (B, F) of the first global clip."""
        weights, t = self.weights, self.temperature
        count = self.local_clips if weights["local"] > 0 or weights["global_local"] > 0 else 0
        views = self.batch_views(batch, 2 + 2 * count)
        # Each view is a forward pass of its own, as in the reference implementation: BatchNorm does not mix clip kinds.
        steps = [clip_steps(self.backbone, view) for view in views[:2]]  # (B, S, F) each
        features = [time_mean(each) for each in steps]  # (B, F) each
        terms: dict[str, Tensor] = {}
        if weights["instance"] > 0:
            terms["instance"] = weights["instance"] * nt_xent(*map(self.projector, features), temperature=t)
        if count:
            local = torch.unflatten(torch.stack([self.projector(self(view)) for view in views[2:]]), 0, (2, count))
            if weights["instance"] > 0:  # local clips: (2, J, B, D)
                terms["instance"] += weights["instance"] * tclr_instance_loss(local, temperature=t)
            if weights["local"] > 0:
                terms["local"] = weights["local"] * tclr_local_loss(local, temperature=t)
            if weights["global_local"] > 0:
                moments = torch.stack([project_moments(self.projector, each, count) for each in steps])  # (2, J, B, D)
                terms["global_local"] = weights["global_local"] * tclr_global_local_loss(moments, local, temperature=t)
        loss = torch.stack([*terms.values()]).sum()
        self.log("train/loss", loss, batch_size=len(views[0]))
        for name, term in terms.items() if len(terms) > 1 else ():
            self.log(f"train/{name}_loss", term.detach(), batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}
