"""data2vec for images: predict the EMA teacher's averaged features of masked patches.

Paper: https://arxiv.org/abs/2202.03555.
Reference implementation: facebookresearch/data2vec_vision.
Differs from it: timm's learned positions instead of relative ones; the mask token starts at zero; the class token and
the positions have weight decay; the learning rate falls to 0 instead of 1e-5; the teacher is updated once per optimizer
step, and is the whole backbone; gradients are clipped by the Trainer's ``gradient_clip_val``, which is 3 in the
reference. The fairseq port has another loss: a sum over channels divided by the square root of their number, which is
28 times as large at 768 channels.
"""

from typing import Any, ClassVar, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_not_negative, check_probability, require
from lightning_contrast.augment import data2vec_views
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.losses import average_layers, data2vec_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import MaskedViT, MaskSampler, build_head, build_masked_backbone, build_masks
from lightning_contrast.nn.masking import draw_masks, gather
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class Data2Vec(SelfSupervisedModule):
    """Predict, for masked patches, the mean of the last layers of an EMA teacher that sees the whole image.

    A batch holds one view (B, C, h, w), square, of any size that is a multiple of the patch; `forward` gives features
    (B, F): by name, the mean of the patches. The step's ``"features"`` are those of the masked images;
    ``momentum_backbone`` is the teacher. Logs ``train/target_std`` and ``train/prediction_std``, the standard deviation
    over masked patches, a mean over channels: 0 in a collapse, and at most about 1 for the targets.

    Args:
        backbone: ``"small_vit"``, the name of a timm vision transformer, or such a module, whose patches can be masked.
            By name it has ``global_pool="avg", fc_norm=False``, a class token, a drop path of 0.25 and LayerScale from
            1e-4.
        top_k: Number of the teacher's last blocks whose outputs are averaged, >= 1; None is 6 as in the paper (of 12 or
            24), or all of a network with fewer.
        layer_norm_layers: Normalize each block's patches over the channels before the average.
        instance_norm_layers: Normalize each block's channels over the patches before the average; data2vec 2.0 does
            this instead.
        layer_norm_targets: Normalize the average over the channels.
        beta: Where the squared error becomes linear, >= 0; 0 for the squared error.
        mask: "block" as in the paper, "random", "grid" or "inverse_block" (data2vec 2.0), see `nn.MASKS`; or a sampler
            ``(images, grid, generator=None)``.
        mask_ratio: Share of masked patches, in (0, 1), 120 of 196 in the paper; a sampler of your own does not get it.
        predictor: A module (M, F) -> (M, F) that replaces the linear layer.
        momentum: EMA momentum of the teacher, constant, in [0, 1].
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.002 x global batch / 2048.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; None is 10, fewer in short runs.
        **options: See `MethodOptions`; ``small_images`` must be False.
    """

    base_lr: ClassVar[float] = 0.00025
    backbone: MaskedViT
    momentum_backbone: MaskedViT
    encodes_whole_images: ClassVar[bool] = False
    sharded_methods: ClassVar = {"backbone": ("tokens",), "momentum_backbone": ("layers",)}
    default_warmup_epochs: ClassVar[int] = 10
    views = staticmethod(data2vec_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        top_k: int | None = None,
        layer_norm_layers: bool = True,
        instance_norm_layers: bool = False,
        layer_norm_targets: bool = True,
        beta: float = 2.0,
        mask: str | MaskSampler = "block",
        mask_ratio: float = 120 / 196,
        predictor: nn.Module | None = None,
        momentum: float = 0.9998,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        weight_decay: float = 0.05,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        defaults = {"global_pool": "avg", "fc_norm": False, "drop_path_rate": 0.25, "init_values": 1e-4}
        super().__init__(
            build_masked_backbone(backbone, defaults=defaults, **backbone_options(options)),
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            lr_schedule=options.get("lr_schedule"),
        )
        self.backbone.check_patches_trained()
        depth = len(self.backbone.vit.blocks)
        self.top_k = min(6, depth) if top_k is None else top_k
        check_at_least("top_k", self.top_k, 1)
        require(self.top_k <= depth, "top_k", f"be at most the {depth} blocks of the backbone", top_k, "Average fewer")
        check_not_negative("beta", beta)
        check_probability("momentum", momentum)
        self.norms = {
            "layer_norm_layers": layer_norm_layers,
            "instance_norm_layers": instance_norm_layers,
            "layer_norm_targets": layer_norm_targets,
        }
        self.beta, self.momentum = beta, momentum
        self.mask_sampler = build_masks(mask, self.backbone.own_grid, ratio=mask_ratio)
        self.predictor = predictor or build_head("data2vec", self.feature_dim)
        self.momentum_backbone = teacher_of(self.backbone)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the smooth L1 loss of the masked patches, and features (B, F) of the masked images."""
        (images,) = self.batch_views(batch, count=1)  # (B, C, h, w)
        masks = draw_masks(self.mask_sampler, self.backbone, images)
        student = self.backbone.tokens(images, mask=masks.mask)  # (B, F) and (B, N, F)
        prediction = self.predictor(gather(student.patches, masks.rows))  # (M, F)
        with torch.no_grad():
            targets = average_layers(self.momentum_backbone.layers(images, self.top_k), **self.norms)  # (B, N, F)
            target = gather(targets, masks.rows)  # (M, F)
        loss = data2vec_loss(prediction, target, beta=self.beta)
        self.log("train/loss", loss, batch_size=len(images))
        for name, rows in (("target_std", target), ("prediction_std", prediction)):
            deviation = rows.detach().float().std(0, correction=0).mean()
            self.log(f"train/{name}", deviation, batch_size=len(images))
        # MomentumUpdate moves the teacher after the optimizer step.
        return {"loss": loss, "features": student.features.detach()}

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback."""
        return [MomentumUpdate(self.momentum, self.momentum, "constant")]

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (student, teacher)."""
        return [(self.backbone, self.momentum_backbone)]
