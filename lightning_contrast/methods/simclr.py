"""SimCLR: views of one image attract, those of all other images of the global batch repel.

Papers: https://arxiv.org/abs/2002.05709 (v1), https://arxiv.org/abs/2006.10029 (v2).
Reference program: google-research/simclr.
Differs from it: the loss is the paper's mean over the 2N anchors (the program adds two means, twice that); weight
decay defaults to the paper's 1e-6 (the program's README command has 1e-4); momentum of LARS is applied before the
learning rate (`optim.LARS`).
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_choice, require
from lightning_contrast.losses import Negatives, nt_xent
from lightning_contrast.losses.negatives import as_negatives
from lightning_contrast.methods.base import SelfSupervisedModule, temperature_of
from lightning_contrast.methods.false_negatives import SameImages, check_mask_same, groups_of
from lightning_contrast.nn import Norm, hidden_layers, simclr_head
from lightning_contrast.nn.temperature import Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike


class SimCLR(SelfSupervisedModule):
    """Contrast the two views of each image with all other images.

    A batch holds two views (B, C, h, w); `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        head_layers: Layers of the projector: 2 is SimCLR v1, 3 is SimCLR v2.
        head_norm: Norm of the projector's layers, "batch", "layer" or None.
        evaluation_layer: Where `forward` takes the features: 0 is the backbone's output, 1 the output of the head's
            first layer, from which SimCLR v2 fine-tunes (3-layer heads only).
        projection_dim: D, the width of the projection.
        projector: A module (B, F) -> (B, D) in the place of the head.
        temperature: Divisor of the cosine similarities, > 0; the paper has 0.1 on ImageNet and 0.5 on CIFAR-10. A
            number, `nn.LearnedTemperature`, `nn.ScheduledTemperature`, or a function of the optimizer step.
        weighting: How the other images count: a `losses.Negatives`, or the name of one.
        mask_same: Which other images are known to show the same and do not count as negatives: those with the same
            "label" or "index" in the batch; None: all count. A label below 0 is unknown.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Learning rate after the warm-up, absolute; None is the paper's 0.3 x global batch / 256.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
    """

    base_lr: ClassVar[float] = 0.3

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
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
        warmup_epochs: int = 10,
    ) -> None:
        super().__init__(
            backbone,
            small_images=small_images,
            feature_dim=feature_dim,
            backbone_kwargs=backbone_kwargs,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
        )
        check_choice("head_layers", head_layers, (2, 3))
        check_choice("evaluation_layer", evaluation_layer, (0, 1))
        tappable = evaluation_layer == 0 or (head_layers == 3 and projector is None)
        hint = "Set `head_layers=3` and no `projector`, or `evaluation_layer=0`"
        require(tappable, "evaluation_layer", "be 0 without SimCLR v2's own head", evaluation_layer, hint)
        self.temperature = check_temperature(temperature)
        self.weighting, self.mask_same = as_negatives(weighting), check_mask_same(mask_same)
        head = projector or simclr_head(self.feature_dim, None, projection_dim, layers=head_layers, norm=head_norm)
        self.tap: nn.Module = nn.Identity()
        if evaluation_layer == 1:
            self.tap = hidden_layers(head, 1)
            head = cast("nn.Sequential", head.layers)[len(self.tap) :]
        self.projector = head
        self.save_hyperparameters()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of images (B, C, H, W)."""
        return self.tap(self.backbone(images))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the NT-Xent loss of a batch of two views."""
        view_a, view_b = self.views(batch, count=2)
        features = self(torch.cat([view_a, view_b]))  # (2B, F): BatchNorm sees both views, as in the program
        projection_a, projection_b = self.projector(features).chunk(2)  # (B, D) each
        loss = nt_xent(
            projection_a,
            projection_b,
            temperature=temperature_of(self),
            weighting=self.weighting,
            groups=groups_of(batch, self.mask_same, "SimCLR"),  # (B,)
        )
        self.log("train/loss", loss, batch_size=len(view_a))
        return {"loss": loss, "features": features[: len(view_a)].detach()}
