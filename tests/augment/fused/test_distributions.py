"""Fused views against torchvision's reference pipeline: the distribution of the pixels over the bundled images."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from lightning_contrast import augment
from lightning_contrast.augment.fused import (
    FusedColorJitter,
    FusedErase,
    FusedGaussianBlur,
    FusedResizedCrop,
    FusedSolarize,
)

QUANTILES = torch.tensor([0.05, 0.1, 0.25, 0.5, 0.75, 0.9])
ROUNDS = 2


def statistics(views: Tensor) -> Tensor:
    """Per channel: mean and standard deviation of all pixels, and quantiles of the mean of each image, (3, 8)."""
    pixels = views.transpose(0, 1).flatten(1)
    means = views.mean((2, 3))
    return torch.cat([pixels.mean(1)[:, None], pixels.std(1)[:, None], means.quantile(QUANTILES, 0).T], 1)


def each(transform, images: Tensor) -> Tensor:
    """Apply a torchvision transform image by image, so that each has its own draw."""
    return torch.stack([transform(image) for image in images])


PAIRS = {
    "crop": (
        FusedResizedCrop(32, interpolation="bicubic"),
        v2.Compose(
            [v2.RandomResizedCrop(32, interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(0.5)]
        ),
    ),
    "brightness": (FusedColorJitter(0.8), v2.ColorJitter(0.8)),
    "contrast": (FusedColorJitter(0, 0.8), v2.ColorJitter(0, 0.8)),
    "saturation": (FusedColorJitter(0, 0, 0.8), v2.ColorJitter(0, 0, 0.8)),
    "hue": (FusedColorJitter(0, 0, 0, 0.2), v2.ColorJitter(0, 0, 0, 0.2)),
    "jitter": (
        FusedColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
    ),
    "grayscale": (FusedColorJitter(grayscale=0.2), v2.RandomGrayscale(0.2)),
    "blur": (FusedGaussianBlur(0.5, kernel_size=9), v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.5)),
    "solarize": (FusedSolarize(0.2), v2.RandomSolarize(0.5, 0.2)),
    "erase": (FusedErase(0.5), v2.RandomErasing(0.5)),
}
FAST = {"crop", "brightness", "contrast", "saturation", "grayscale", "solarize", "erase"}  # in torchvision


@pytest.mark.parametrize("name", PAIRS)
def test_operation(emoji, name):
    """Within 0.02 of the reference in mean and standard deviation, 0.035 in the quantiles (1,000 or 3,000 draws)."""
    ours, theirs = PAIRS[name]
    images = emoji[:: 1 if name in FAST else 3].float() / 255
    torch.manual_seed(0)
    fused = torch.cat([ours(images) for _ in range(ROUNDS)])
    reference = torch.cat([each(theirs, images) for _ in range(ROUNDS)])
    difference = (statistics(fused) - statistics(reference)).abs()
    assert difference[:, :2].max() < 0.02
    assert difference[:, 2:].max() < 0.035


@pytest.fixture(scope="module")
def reference(emoji) -> Tensor:
    """The statistics of SimCLR's views as torchvision makes them."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(32, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(3, (0.1, 2.0))], 0.5),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    torch.manual_seed(1)
    return statistics(each(transform, emoji))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.slow
def test_whole_policy(emoji, reference, fused):
    """All of SimCLR's operations, within 0.02 and 0.04; stock Kornia too, with one order of colors per batch."""
    torch.manual_seed(0)
    policy = augment.simclr_views(32, fused=fused)
    parts = emoji.split(1558 if fused else 64)
    views = torch.cat([view for part in parts for view in policy(part)])
    difference = (statistics(views) - reference).abs()
    assert difference[:, :2].max() < 0.02
    assert difference[:, 2:].max() < 0.04
