"""Views made of stock Kornia operations: ``fused=False``, and the baseline of the fused ones."""

from collections.abc import Sequence

import kornia.augmentation as K
import torch
from kornia.augmentation.auto import AutoAugment, RandAugment, TrivialAugment
from torch import Tensor, nn

from lightning_contrast.augment.images import as_float
from lightning_contrast.augment.view_spec import BLUR_SIGMA, Auto, ViewSpec

_RANDAUGMENT_COUNT, _RANDAUGMENT_MAGNITUDE = 2, 9  # out of 30; the paper's values for a ResNet-50 on ImageNet


def auto_augment(name: Auto) -> nn.Module:
    """Return the Kornia automatic augmentation called ``name``, with its published settings."""
    if name == "randaugment":
        return RandAugment(_RANDAUGMENT_COUNT, _RANDAUGMENT_MAGNITUDE)
    if name == "autoaugment":
        return AutoAugment("imagenet")
    return TrivialAugment()


class StockView(nn.Module):
    """Make one random view of each image with stock Kornia operations.

    Unlike in `FusedView`, downscaled crops are point-sampled, the order of the color operations is drawn once per
    batch, the blur's kernel has one width for all images, brightness is always multiplied, and boxes that do not fit
    are always redrawn.

    Args:
        spec: Parameters of the view.
        mean: Subtracted at the end, one number per channel.
        std: Divided by at the end, one number per channel.
        pre_transform: Applied to the images first.
    """

    def __init__(
        self, spec: ViewSpec, mean: Sequence[float], std: Sequence[float], pre_transform: nn.Module | None = None
    ) -> None:
        super().__init__()
        size = (spec.size, spec.size)
        crop = K.RandomResizedCrop(
            size, scale=spec.scale, resample="bicubic" if spec.bicubic else "bilinear", align_corners=False
        )
        jitter = K.ColorJitter(*spec.jitter, p=spec.jitter_p)
        gray = [K.RandomGrayscale(p=spec.gray_p)] if spec.gray_p > 0 else []
        operations = [
            *([pre_transform] if pre_transform is not None else []),
            crop,
            nn.Hardtanh(0.0, 1.0),
            K.RandomHorizontalFlip(p=spec.flip),
        ]
        operations += [*gray, jitter] if spec.gray_first else [jitter, *gray]
        # reflection padding must be narrower than the image
        widest = max(1, min(spec.blur_kernel or 17, 2 * spec.size - 1))
        if spec.blur_p > 0 and widest > 1:
            operations.append(K.RandomGaussianBlur((widest, widest), BLUR_SIGMA, p=spec.blur_p))
        if spec.solarize_p > 0:
            operations.append(K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=spec.solarize_p))
        if any(m != 0 for m in mean) or any(s != 1 for s in std):
            operations.append(K.Normalize(mean=torch.tensor(mean), std=torch.tensor(std)))
        self.operations = nn.Sequential(*operations)

    def forward(self, images: Tensor) -> Tensor:
        """Return the views ``(B, C, size, size)`` of ``images`` ``(B, C, H, W)``, uint8 or float."""
        views: Tensor = self.operations(as_float(images).clamp(0, 1))
        return views
