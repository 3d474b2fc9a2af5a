"""The same views from stock Kornia operations: the reference of the fused ones, and ``fused=False``."""

from collections.abc import Sequence

import kornia.augmentation as K
import torch
from kornia.augmentation.auto import AutoAugment, RandAugment, TrivialAugment
from torch import Tensor, nn

from lightning_contrast.augment.images import as_float
from lightning_contrast.augment.view_spec import BLUR_SIGMA, Auto, ViewRecipe

_RANDAUGMENT_COUNT, _RANDAUGMENT_MAGNITUDE = 2, 9  # of 30; the paper's for ImageNet and a ResNet-50


def auto_augment(name: Auto) -> nn.Module:
    """Return Kornia's automatic augmentation of that name, with its published settings."""
    if name == "randaugment":
        return RandAugment(_RANDAUGMENT_COUNT, _RANDAUGMENT_MAGNITUDE)
    if name == "autoaugment":
        return AutoAugment("imagenet")
    return TrivialAugment()


class StockView(nn.Module):
    """One random view of each image by stock Kornia operations.

    Differs from the fused view: crops are point-sampled where they shrink, the order of the colour operations is
    drawn once for a batch, the blur's kernel has one width for all images, brightness is always multiplied, and
    boxes that do not fit are always drawn again.

    Args:
        recipe: The numbers of the view.
        mean: Subtracted at the end, one number a channel.
        std: Divided by at the end, one number a channel.
        pre_transform: What the images go through first.
    """

    def __init__(
        self, recipe: ViewRecipe, mean: Sequence[float], std: Sequence[float], pre_transform: nn.Module | None = None
    ) -> None:
        super().__init__()
        size = (recipe.size, recipe.size)
        crop = K.RandomResizedCrop(
            size, scale=recipe.scale, resample="bicubic" if recipe.bicubic else "bilinear", align_corners=False
        )
        jitter = K.ColorJitter(*recipe.jitter, p=recipe.jitter_p)
        gray = [K.RandomGrayscale(p=recipe.gray_p)] if recipe.gray_p > 0 else []
        operations = [
            *([pre_transform] if pre_transform is not None else []),
            crop,
            nn.Hardtanh(0.0, 1.0),
            K.RandomHorizontalFlip(p=recipe.flip),
        ]
        operations += [*gray, jitter] if recipe.gray_first else [jitter, *gray]
        # reflection needs a border narrower than the image
        widest = max(1, min(recipe.blur_kernel or 17, 2 * recipe.size - 1))
        if recipe.blur_p > 0 and widest > 1:
            operations.append(K.RandomGaussianBlur((widest, widest), BLUR_SIGMA, p=recipe.blur_p))
        if recipe.solarize_p > 0:
            operations.append(K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=recipe.solarize_p))
        if any(m != 0 for m in mean) or any(s != 1 for s in std):
            operations.append(K.Normalize(mean=torch.tensor(mean), std=torch.tensor(std)))
        self.operations = nn.Sequential(*operations)

    def forward(self, images: Tensor) -> Tensor:
        """Return the views ``(B, C, size, size)`` of ``images`` ``(B, C, H, W)``, uint8 or float."""
        views: Tensor = self.operations(as_float(images).clamp(0, 1))
        return views
