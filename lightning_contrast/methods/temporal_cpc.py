"""CPC over time: predict the features of the next frames of a clip, and tell them from those of other frames.

Paper: https://arxiv.org/abs/1807.03748 (sound there). Reference implementation: facebookresearch/CPC_audio.
Differs from it: frames of clips, each encoded by an image network, instead of windows of sound; the paper's GRU and
linear predictions (there an LSTM, and by default a transformer layer per step); AdamW with a cosine.
"""

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, require
from lightning_contrast.augment import cpc_clip_views
from lightning_contrast.losses import cpc_all_times_loss, cpc_time_loss, draw_time_negatives
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import (
    TimePredictor,
    VideoBackbone,
    build_clip_backbone,
    clip_steps,
    replace_batchnorm,
    time_mean,
)
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class TemporalCPC(SelfSupervisedModule):
    """Tell the frame some steps ahead from other frames, by the context of the frames up to now.

    A batch holds one view of clips (B, T, C, h, w), which `augment.cpc_clip_views` makes. Frames are encoded one by
    one. `forward` gives the features (B, F) of clips, the mean over time, or of images (B, C, H, W); `context` gives
    the context (B, A) after the last frame, which also knows how things moved. Logs ``train/loss``, which is
    ``ln(1 + negatives)`` or, against all frames, ``ln(B T)`` at the start.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        steps: K, how many steps ahead are predicted, >= 1; 12 in the paper. A clip needs more frames.
        negatives: Number of drawn negatives per context, of any clip of this rank's batch and any time but that of the
            context; 128 as in the reference implementation. None: all frames of all clips of the global batch.
        context_dim: A, the width of the context.
        layer_norm: Replace BatchNorm by LayerNorm in a backbone that is given by name, see `nn.replace_batchnorm`:
            BatchNorm would show a frame the frames that it is told from. A module is used as it is.
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; the reference implementation has 2e-4 with Adam.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: See `MethodOptions`.

    Raises:
        ValueError: If a number is out of range, or the backbone sees several frames at once; in a step, if clips have
            no more than K frames.
    """

    base_lr: ClassVar[float] = 2e-4
    views = staticmethod(cpc_clip_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        steps: int = 12,
        negatives: int | None = 128,
        context_dim: int = 256,
        layer_norm: bool = True,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = 2e-4,
        weight_decay: float = 1e-5,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        net = build_clip_backbone(backbone, **backbone_options(options))
        video = isinstance(net.module, VideoBackbone)
        hint = "Give an image network: one that sees several frames at once would see what it predicts"
        require(not video, "backbone", "see frames one by one", backbone, hint)
        if layer_norm and isinstance(backbone, str):
            replace_batchnorm(net.module)
        super().__init__(
            net, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_at_least("steps", steps, 1)
        if negatives is not None:
            check_at_least("negatives", negatives, 1)
        self.steps, self.negatives = steps, negatives
        self.predictor = TimePredictor(self.feature_dim, context_dim, steps)
        self.save_hyperparameters()

    def forward(self, clips: Tensor) -> Tensor:
        """Return the features (B, F) of clips (B, T, C, H, W), the mean over time, or of images (B, C, H, W)."""
        return time_mean(clip_steps(self.backbone, clips))

    def context(self, clips: Tensor) -> Tensor:
        """Return the context (B, A) after the last frame of clips (B, T, C, H, W)."""
        contexts, _ = self.predictor(clip_steps(self.backbone, clips))
        return contexts[:, -1]  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of one view, and features (B, F)."""
        (clips,) = self.batch_views(batch, count=1)
        frames = clip_steps(self.backbone, clips)  # (B, T, F)
        hint = "Make longer clips, or lower `steps`"
        require(frames.shape[1] > self.steps, "clips", f"have more than {self.steps} frames", frames.shape[1], hint)
        context, matrices = self.predictor(frames)  # (B, T, A), (K, F, A)
        if self.negatives is None:
            loss = cpc_all_times_loss(context, frames, matrices)
        else:
            drawn = draw_time_negatives(frames, steps=self.steps, negatives=self.negatives)
            loss = cpc_time_loss(context, frames, matrices, *drawn)
        self.log("train/loss", loss, batch_size=len(clips))
        return {"loss": loss, "features": time_mean(frames.detach())}
