"""SimMIM: reconstruct the pixels of masked patches with one linear layer.

Paper: https://arxiv.org/abs/2111.09886.
Reference implementation: microsoft/SimMIM.
Differs from it: ViTs only, with timm's positions and initialization instead of relative positions (the reference also
has Swin); the mask token starts at zero, and has weight decay, as have the class token and the positions; the learning
rate falls as a cosine to 0, as in the paper's short runs; gradients are clipped by the Trainer's ``gradient_clip_val``,
which is 5 in the reference.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast.augment import simmim_views
from lightning_contrast.losses import masked_l1_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import MaskedViT, MaskSampler, build_masked_backbone, build_masks
from lightning_contrast.nn.masking import draw_masks
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class SimMIM(SelfSupervisedModule):
    """Replace patches by a mask token, encode all of them, and predict the masked pixels with a linear layer.

    A batch holds one view (B, C, h, w), square, of any size that is a multiple of the patch and fits the mask;
    `forward` gives features (B, F): by name, the mean of the patches. The step's ``"features"`` are those of the masked
    images.

    Args:
        backbone: ``"small_vit"``, the name of a timm vision transformer, or such a module, whose patches can be masked.
            By name it has ``global_pool="avg", fc_norm=False`` and a class token.
        mask: "random" as in the paper, "grid", "block" or "inverse_block", see `nn.MASKS`; or a sampler
            ``(images, grid, generator=None)``.
        mask_ratio: Share of masked patches, in (0, 1); a sampler of your own does not get it.
        mask_unit: Edge of the squares that a "random" mask hides as one, in patches, >= 1; 2 for the paper's 32 pixels
            and patches of 16.
        decoder: A module from maps (B, F, h / p, w / p) to images (B, C, h, w) that replaces the 1x1 convolution and
            the pixel shuffle.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.0002 x global batch / 512.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; None is 10, fewer in short runs.
        **options: See `MethodOptions`; ``small_images`` must be False.
    """

    base_lr: ClassVar[float] = 0.0001
    backbone: MaskedViT
    encodes_whole_images: ClassVar[bool] = False
    sharded_methods: ClassVar = {"backbone": ("tokens",)}
    default_warmup_epochs: ClassVar[int] = 10
    views = staticmethod(simmim_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        mask: str | MaskSampler = "random",
        mask_ratio: float = 0.6,
        mask_unit: int = 2,
        decoder: nn.Module | None = None,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        weight_decay: float = 0.05,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        pooling = {"global_pool": "avg", "fc_norm": False}
        super().__init__(
            build_masked_backbone(backbone, defaults=pooling, **backbone_options(options)),
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            lr_schedule=options.get("lr_schedule"),
        )
        self.backbone.check_patches_trained()
        self.patch_size, channels = self.backbone.patch_size, self.backbone.channels
        unit = {"unit": mask_unit} if mask == "random" else {}
        self.mask_sampler = build_masks(mask, self.backbone.own_grid, ratio=mask_ratio, **unit)
        self.decoder = decoder or nn.Sequential(
            nn.Conv2d(self.feature_dim, self.patch_size**2 * channels, 1), nn.PixelShuffle(self.patch_size)
        )
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean absolute error of the masked pixels, and features (B, F) of the masked images."""
        (images,) = self.batch_views(batch, count=1)  # (B, C, h, w)
        features, reconstruction, mask = self.predict_pixels(images)  # (B, F), (B, C, h, w), (B, h / p, w / p)
        loss = masked_l1_loss(images, reconstruction, mask, patch_size=self.patch_size)
        self.log("train/loss", loss, batch_size=len(images))
        return {"loss": loss, "features": features.detach()}

    def predict_pixels(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw masks and predict all pixels.

        Args:
            images: Images (B, C, h, w).

        Returns:
            Features (B, F), predicted images (B, C, h, w), and masks (B, h / p, w / p).
        """
        mask = draw_masks(self.mask_sampler, self.backbone, images).mask  # (B, N)
        grid = self.backbone.grid_size(images)
        tokens = self.backbone.tokens(images, mask=mask)  # (B, F), (B, N, F)
        reconstruction = self.decoder(tokens.patches.mT.reshape(len(images), -1, *grid))
        return tokens.features, reconstruction, mask.view(len(images), *grid)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mask patches and fill them with the prediction, for `evaluation.reconstruction_grid`.

        Args:
            images: Images (B, C, h, w), transformed as for the training.

        Returns:
            The images with predictions in the masked patches, (B, C, h, w), and the masks (B, N) bool.
        """
        _, reconstruction, mask = self.predict_pixels(images)
        pixels = mask.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2).unsqueeze(1)
        return torch.where(pixels, reconstruction.to(images.dtype), images), mask.flatten(1)
