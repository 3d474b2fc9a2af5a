"""Temporal contrast on clips: TCLR's instance, local-local and global-local losses; CVRL is the first one alone.

Papers: https://arxiv.org/abs/2101.07974 (TCLR), https://arxiv.org/abs/2008.03800 (CVRL).
Reference implementations: DAVEISHAN/TCLR, tensorflow/models (official/projects/video_ssl).
Differs from them: sums and means cover the videos of all ranks; a cosine schedule, where TCLR divides the learning rate
by 10 at plateaus of the training loss; CVRL's loss is the mean over 2N anchors (the reference adds two means, twice
that).
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_not_negative, check_positive, require
from lightning_contrast.augment import clip_views
from lightning_contrast.losses import nt_xent, tclr_global_local_loss, tclr_instance_loss, tclr_local_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import BackboneOptions, Norm, build_clip_backbone, build_head, clip_steps
from lightning_contrast.optim import OptimizerLike


class TemporalContrast(SelfSupervisedModule):
    """Contrast clips with those of other videos, and moments of a video with its other moments.

    A batch holds the views of `augment.clip_views`, each (B, T, C, h, w): two global clips, and unless both temporal
    weights are 0, J local clips of the first and J of the second augmentation. `forward` gives features (B, F) of
    clips, the mean over time; images (B, C, H, W) are clips of one frame, which only the instance loss can train on.

    Args:
        backbone: "r3d_18", "mc3_18", "r2plus1d_18", "small_video_convnet" or a `nn.VideoBackbone`; or the name of a
            timm model or a module that maps images (B, C, H, W) to features (B, F), for each frame.
        head_norm: Norm of the projector's layers, "batch", "layer" or None.
        projection_dim: D, the width of the projection.
        projector: A module (B, F) -> (B, D) that replaces TCLR's head; CVRL's is ``nn.build_head("cvrl", F)``.
        local_clips: J, local clips of each augmentation, >= 2; that of the views.
        instance_weight: Weight of the contrast with other videos: NT-Xent of the global clips, and of all pairs of
            local clips if there are any; >= 0.
        local_weight: Weight of the contrast between the local clips of a video, >= 0.
        global_local_weight: Weight of the contrast between time steps of the global clip and local clips, >= 0.
        temperature: Divisor of the cosine similarities, > 0.
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable. TCLR has Adam, CVRL SGD.
        lr: Peak learning rate, absolute; None is TCLR's 0.001 x global batch / 40.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: See `BackboneOptions`, and `nn.build_clip_backbone`.

    Raises:
        ValueError: If a number is out of range, or all weights are 0; in a step, if the number of views is another one,
            or the global clips do not have a multiple of J time steps.
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
        **options: Unpack[BackboneOptions],
    ) -> None:
        built = build_clip_backbone(backbone, **options)
        super().__init__(built, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs)
        check_at_least("local_clips", local_clips, 2, "A moment needs another one; set both temporal weights to 0")
        weights = {"instance_weight": instance_weight, "local_weight": local_weight}
        weights |= {"global_local_weight": global_local_weight}
        for name, weight in weights.items():
            check_not_negative(name, weight)
        hint = "Set at least one of them above 0"
        require(any(weights.values()), "instance_weight", "be above 0 if the temporal weights are 0", 0, hint)
        check_positive("temperature", temperature, "TCLR and CVRL have 0.1")
        self.instance_weight, self.local_weight = instance_weight, local_weight
        self.global_local_weight, self.temperature, self.local_clips = global_local_weight, temperature, local_clips
        self.projector = projector or build_head("tclr", self.feature_dim, out_dim=projection_dim, norm=head_norm)
        self.save_hyperparameters()

    @property
    def uses_local_clips(self) -> bool:
        """Whether a batch holds local clips: not if the instance loss is alone."""
        return self.local_weight > 0 or self.global_local_weight > 0

    def forward(self, clips: Tensor) -> Tensor:
        """Return the features (B, F) of clips (B, T, C, H, W) or images (B, C, H, W)."""
        return clip_steps(self.backbone, clips).mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the weighted sum of the losses, and features (B, F) of the first global clip."""
        count = self.local_clips if self.uses_local_clips else 0
        views = self.batch_views(batch, 2 + 2 * count)
        # Each view is a forward pass of its own, as in the reference implementation: BatchNorm does not mix clip kinds.
        global_steps = [clip_steps(self.backbone, view) for view in views[:2]]  # (B, S, F) each
        features = [steps.mean(1) for steps in global_steps]  # (B, F) each
        terms: dict[str, Tensor] = {}
        if self.instance_weight > 0:
            pair = [self.projector(each) for each in features]
            terms["instance"] = self.instance_weight * nt_xent(*pair, temperature=self.temperature)
        if count:
            local = torch.stack([self.projector(self(view)) for view in views[2:]])  # (2J, B, D)
            local = torch.unflatten(local, 0, (2, count))  # (2, J, B, D)
            if self.instance_weight > 0:
                dense = tclr_instance_loss(local, temperature=self.temperature)
                terms["instance"] = terms["instance"] + self.instance_weight * dense
            if self.local_weight > 0:
                terms["local"] = self.local_weight * tclr_local_loss(local, temperature=self.temperature)
            if self.global_local_weight > 0:
                steps = torch.stack([self._project_steps(each) for each in global_steps])  # (2, J, B, D)
                loss = tclr_global_local_loss(steps, local, temperature=self.temperature)
                terms["global_local"] = self.global_local_weight * loss
        loss = torch.stack([*terms.values()]).sum()
        self.log("train/loss", loss, batch_size=len(views[0]))
        for name, term in terms.items() if len(terms) > 1 else ():
            self.log(f"train/{name}_loss", term.detach(), batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}

    def _project_steps(self, steps: Tensor) -> Tensor:
        """Return projections ``(J, B, D)`` of steps ``(B, S, F)``, of which S / J in a row are averaged."""
        found, count = steps.shape[1], self.local_clips
        hint = (
            "Give global clips of more frames, or a backbone with another temporal stride, such as keep_time of r3d_18"
        )
        require(found % count == 0, "views", f"give a multiple of {count} time steps per global clip", found, hint)
        pooled = torch.unflatten(steps, 1, (count, -1)).mean(2)  # (B, J, F)
        projected: Tensor = self.projector(pooled.flatten(0, 1))  # (B * J, D): one BatchNorm over all steps
        return torch.unflatten(projected, 0, (-1, count)).transpose(0, 1)
