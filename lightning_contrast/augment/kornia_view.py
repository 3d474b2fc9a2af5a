"""Views made of stock Kornia operations: ``fused=False``, and the baseline of the fused ones."""

import dataclasses
from collections.abc import Sequence

import kornia.augmentation as K
import torch
from kornia.augmentation.auto import AutoAugment, RandAugment, TrivialAugment
from kornia.augmentation.auto.autoaugment.autoaugment import imagenet_policy
from kornia.augmentation.auto.rand_augment.rand_augment import default_policy as RANDAUGMENT
from kornia.augmentation.auto.trivial_augment.trivial_augment import default_policy as TRIVIALAUGMENT
from torch import Tensor, nn

from lightning_contrast.augment.fused.base import floored, towards
from lightning_contrast.augment.images import as_float
from lightning_contrast.augment.view_spec import BLUR_SIGMA, Auto, ViewSpec
from lightning_contrast.seeding import send

_RANDAUGMENT_COUNT, _RANDAUGMENT_MAGNITUDE = 2, 9  # out of 30; the paper's values for a ResNet-50 on ImageNet


class PerImage(nn.Module):
    """Apply to each image ``count`` of the given modules, drawn for each image with replacement.

    Kornia's automatic augmentations draw their operations once per batch; the papers and torchvision draw them for
    each image. Images with the same operation are processed together, so a batch takes one call per operation and
    not one per image. Row numbers are drawn on the host and copied to the device; nothing is read back.

    Args:
        choices: Modules from images ``(N, C, H, W)`` to images of the same shape, all equally likely.
        count: Number of modules per image, >= 1.

    Attributes:
        strength: Share of the images that are augmented, in 0..1; the others stay.
    """

    strength: float = 1.0

    def __init__(self, choices: Sequence[nn.Module], count: int = 1) -> None:
        super().__init__()
        self.choices, self.count = nn.ModuleList(choices), count

    def forward(self, images: Tensor) -> Tensor:
        """Return the augmented images ``(B, C, H, W)`` of float images of that shape, in the same order."""
        drawn_of_all = torch.randint(len(self.choices), (self.count, len(images)))
        if self.strength < 1:
            drawn_of_all[:, torch.rand(len(images)) >= self.strength] = len(self.choices)  # none
        for drawn in drawn_of_all:
            augmented = torch.empty_like(images) if self.strength == 1 else images.clone()
            for number, choice in enumerate(self.choices):
                rows = (drawn == number).nonzero().flatten()
                if len(rows):
                    rows = send(rows, images.device)
                    augmented.index_copy_(0, rows, choice(images.index_select(0, rows)).to(images.dtype))
            images = augmented
        return images


def auto_augment(name: Auto) -> PerImage:
    """Return an automatic augmentation with its published settings, drawn for each image.

    Args:
        name: ``"randaugment"`` (https://arxiv.org/abs/1909.13719), ``"autoaugment"``
            (https://arxiv.org/abs/1805.09501, the ImageNet policy) or ``"trivialaugment"``
            (https://arxiv.org/abs/2103.10158). The operations and their ranges are Kornia's.
    """
    if name == "randaugment":
        single = [RandAugment(1, _RANDAUGMENT_MAGNITUDE, policy=[operation]) for operation in RANDAUGMENT]
        return PerImage(single, _RANDAUGMENT_COUNT)
    if name == "autoaugment":
        return PerImage([AutoAugment([operations]) for operations in imagenet_policy])
    return PerImage([TrivialAugment([operation]) for operation in TRIVIALAUGMENT])


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
        self.spec, self.mean, self.std, self.pre_transform = spec, mean, std, pre_transform
        self.set_strength(1.0)

    def set_min_area(self, share: float) -> None:
        """Draw no crop with less than a share of the image area, in 0..1; see `ViewPolicy.candidates`."""
        self.spec = dataclasses.replace(self.spec, scale=floored(self.spec.scale, share))
        self.set_strength(1.0)

    def set_strength(self, strength: float) -> None:
        """Set the strength, in 0..1; see `ViewPolicy.set_strength`."""
        spec, mean, std, pre_transform = self.spec.at_strength(strength), self.mean, self.std, self.pre_transform
        sigma = (BLUR_SIGMA[0], towards(BLUR_SIGMA[1], BLUR_SIGMA[0], strength))
        if isinstance(pre_transform, PerImage):
            pre_transform.strength = strength
        size = (spec.size, spec.size)
        crop = K.RandomResizedCrop(
            size,
            scale=spec.scale,
            ratio=spec.ratio,
            resample="bicubic" if spec.bicubic else "bilinear",
            align_corners=False,
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
            operations.append(K.RandomGaussianBlur((widest, widest), sigma, p=spec.blur_p))
        if spec.solarize_p > 0:
            operations.append(K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=spec.solarize_p))
        if any(m != 0 for m in mean) or any(s != 1 for s in std):
            operations.append(K.Normalize(mean=torch.tensor(mean), std=torch.tensor(std)))
        self.operations = nn.Sequential(*operations)

    def forward(self, images: Tensor) -> Tensor:
        """Return the views ``(B, C, size, size)`` of ``images`` ``(B, C, H, W)``, uint8 or float."""
        views: Tensor = self.operations(as_float(images).clamp(0, 1))
        return views
