"""SimCLR: the two views of an image are contrasted with all other images of the global batch.

Papers: https://arxiv.org/abs/2002.05709 (v1), https://arxiv.org/abs/2006.10029 (v2).
Reference implementation: google-research/simclr.
Differs from it: the loss is the paper's mean over 2N anchors (the reference adds two means, twice that); weight decay
defaults to the paper's 1e-6 (the reference's README has 1e-4); LARS applies its momentum before the learning rate
(`optim.LARS`).
"""

from typing import Any, ClassVar, Unpack, cast

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_choice, require
from lightning_contrast.augment import simclr_views
from lightning_contrast.losses import Negatives, nt_xent
from lightning_contrast.losses.negatives import as_negatives
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.methods.false_negatives import SameImages, check_mask_same, sample_ids
from lightning_contrast.nn import Norm, build_head, hidden_layers
from lightning_contrast.nn.multi_crop import forward_by_size, mean_loss, view_pairs
from lightning_contrast.nn.temperature import Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.runtime.temperature import current_temperature


class SimCLR(SelfSupervisedModule):
    """Contrast the two views of each image with all other images.

    A batch holds two or more global views (B, C, h, w) and any number of smaller local views after them; the loss is
    the mean over all pairs of views of an image with at least one global view. `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        head_layers: Layers of the projector: 2 is SimCLR v1, 3 is SimCLR v2.
        head_norm: Norm of the projector's layers, "batch", "layer" or None.
        evaluation_layer: Layer of the head whose output `forward` returns: 0 is the backbone's output, 1 that of the
            head's first layer, from which SimCLR v2 fine-tunes (3-layer heads only).
        projection_dim: D, the width of the projection.
        projector: A module (B, F) -> (B, D) that replaces the head.
        temperature: Divisor of the cosine similarities, > 0; the paper has 0.1 on ImageNet and 0.5 on CIFAR-10. A
            number, `nn.LearnedTemperature`, `nn.ScheduledTemperature`, or a function of the optimizer step.
        weighting: Weighting of the negatives: a `losses.Negatives`, or the name of one.
        mask_same: No negatives with the same "label" or "index"; a label below 0 is unknown. None uses all images.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.3 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; None is 10, fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.3
    views = staticmethod(simclr_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        head_layers: int = 2,
        head_norm: Norm = "batch",
        evaluation_layer: int = 0,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        temperature: Temperature = 0.1,
        weighting: Negatives | str = "uniform",
        mask_same: SameImages | None = None,
        optimizer: OptimizerLike = "lars",
        lr: float | None = None,
        weight_decay: float = 1e-6,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_choice("head_layers", head_layers, (2, 3))
        check_choice("evaluation_layer", evaluation_layer, (0, 1))
        has_layer = evaluation_layer == 0 or (head_layers == 3 and projector is None)
        hint = "Set `head_layers=3` and no `projector`, or `evaluation_layer=0`"
        require(has_layer, "evaluation_layer", "be 0 without SimCLR v2's own head", evaluation_layer, hint)
        self.temperature = check_temperature(temperature)
        self.weighting, self.mask_same = as_negatives(weighting), check_mask_same(mask_same)
        head = projector or build_head(
            "simclr", self.feature_dim, out_dim=projection_dim, layers=head_layers, norm=head_norm
        )
        self.head_layer: nn.Module = nn.Identity()  # between the backbone and the features
        if evaluation_layer == 1:
            self.head_layer = hidden_layers(head, 1)
            head = cast("nn.Sequential", head.layers)[len(self.head_layer) :]
        self.projector = head
        self.save_hyperparameters()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of images (B, C, H, W)."""
        return self.head_layer(self.backbone(images))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean NT-Xent loss of pairs of views, and features (B, F)."""
        views = self.batch_crops(batch)  # V x (B, C, h, w)
        features = forward_by_size(self, views)  # V x (B, F): BatchNorm sees both views, as in the reference
        projections = self.projector(torch.cat(features)).chunk(len(views))  # V x (B, D)
        temperature, ids = current_temperature(self), sample_ids(batch, self.mask_same, "SimCLR")  # ids (B,) or None
        options: dict[str, Any] = {"temperature": temperature, "weighting": self.weighting, "groups": ids}
        pairs = view_pairs(views, both_ways=False)
        loss = mean_loss(nt_xent(projections[i], projections[j], **options) for i, j in pairs)
        self.log("train/loss", loss, batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}
