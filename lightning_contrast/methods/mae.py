"""MAE: reconstruct the pixels of hidden patches from the few visible ones.

Paper: https://arxiv.org/abs/2111.06377.
Reference implementation: facebookresearch/mae.
Differs from it: the encoder has timm's initialization; the decoder's mask token has no weight decay; masks are drawn on
the host.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast.augment import mae_views
from lightning_contrast.losses import masked_pixel_loss, patchify, unpatchify
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import MaskedViT, MaskSampler, PixelDecoder, build_masked_backbone, build_masks
from lightning_contrast.nn.masking import MaskSplit, draw_split
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class MAE(SelfSupervisedModule):
    """Encode the visible patches of an image, and decode the pixels of the hidden ones.

    A batch holds one view (B, C, h, w) of the size that the backbone was built for; `forward` gives features (B, F) of
    whole images: by name, the mean of the patches. The step's ``"features"`` are those of the visible patches. There is
    no teacher and no second view, and the loss says little about the features: probe them.

    Args:
        backbone: ``"small_vit"``, the name of a timm vision transformer, or such a module, whose patches can be
            dropped. By name it has ``global_pool="avg", fc_norm=False`` and a class token.
        mask: "random" as in the paper, "grid", "block" or "inverse_block", see `nn.MASKS`; or a sampler
            ``(images, grid, generator=None)`` that hides as many patches in every image.
        mask_ratio: Share of hidden patches, in (0, 1); a sampler of your own does not get it.
        normalize_pixels: Predict each patch's pixels with their mean and standard deviation removed, which gives better
            features in the paper; its recipe has it.
        fixed_positions: Replace the backbone's learned positions by fixed sine-cosine positions, as in the paper.
        decoder_dim: Width of the decoder, a multiple of 4 and of its heads.
        decoder_depth: Number of the decoder's blocks, >= 1.
        decoder_heads: Number of the decoder's attention heads, >= 1.
        decoder: A module (patches, prefix, visible, hidden) -> (B, N, p * p * C) that replaces the decoder; see
            `PixelDecoder`.
        optimizer: "adamw" as in the paper, with betas (0.9, 0.95); "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.00015 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; None is 40, fewer in short runs.
        **options: See `MethodOptions`; ``small_images`` must be False.
    """

    base_lr: ClassVar[float] = 0.00015
    adamw_options: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.95)}
    backbone: MaskedViT
    encodes_whole_images: ClassVar[bool] = False
    sharded_methods: ClassVar = {"backbone": ("tokens",)}
    default_warmup_epochs: ClassVar[int] = 40
    views = staticmethod(mae_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        mask: str | MaskSampler = "random",
        mask_ratio: float = 0.75,
        normalize_pixels: bool = True,
        fixed_positions: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder: nn.Module | None = None,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        weight_decay: float = 0.05,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        pooling = {"global_pool": "avg", "fc_norm": False}
        super().__init__(
            build_masked_backbone(backbone, mask_token=False, defaults=pooling, **backbone_options(options)),
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            lr_schedule=options.get("lr_schedule"),
        )
        self.backbone.check_patches_trained()
        grid, self.patch_size = self.backbone.own_grid, self.backbone.patch_size
        self.mask_sampler = build_masks(mask, grid, ratio=mask_ratio)
        self.normalize_pixels = normalize_pixels
        if fixed_positions:
            self.backbone.fix_positions()
        self.decoder = decoder or PixelDecoder(
            self.feature_dim,
            grid,
            self.patch_size**2 * self.backbone.channels,
            width=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
        )
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean squared error of the hidden patches' pixels, and features (B, F) of the visible ones."""
        (images,) = self.batch_views(batch, count=1)  # (B, C, h, w)
        features, prediction, split = self.predict_pixels(images)  # (B, F), (B, N, p p C)
        sizes: dict[str, Any] = {"patch_size": self.patch_size, "normalize_pixels": self.normalize_pixels}
        loss = masked_pixel_loss(images, prediction, split.mask, **sizes)
        self.log("train/loss", loss, batch_size=len(images))
        return {"loss": loss, "features": features.detach()}

    def predict_pixels(self, images: Tensor) -> tuple[Tensor, Tensor, MaskSplit]:
        """Draw masks and predict all patches from the visible ones.

        Args:
            images: Images (B, C, h, w).

        Returns:
            Features (B, F) of the visible patches, predictions (B, N, p * p * C), and the masks.
        """
        self.backbone.check_grid(images)
        split = draw_split(self.mask_sampler, self.backbone, images)
        tokens = self.backbone.tokens(images, keep=split.visible)  # (B, F), (B, K, F), (B, P, F)
        prediction = self.decoder(tokens.patches, tokens.prefix, split.visible, split.hidden)
        return tokens.features, prediction, split

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Hide patches and fill them with the prediction, for `evaluation.reconstruction_grid`.

        Args:
            images: Images (B, C, h, w), transformed as for the training.

        Returns:
            The images with predictions in the hidden patches, (B, C, h, w), and the masks (B, N) bool. With
            ``normalize_pixels`` predictions get the mean and the deviation of the hidden pixels themselves.
        """
        _, prediction, split = self.predict_pixels(images)
        patches = patchify(images, patch_size=self.patch_size)
        if self.normalize_pixels:
            deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
            prediction = prediction * deviation + patches.mean(-1, keepdim=True)
        filled = torch.where(split.mask.unsqueeze(-1), prediction.to(images.dtype), patches)
        return unpatchify(filled, self.backbone.own_grid, patch_size=self.patch_size), split.mask
