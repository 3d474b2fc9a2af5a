"""The fused operations as members of Kornia's containers."""

import kornia.augmentation as K
import torch

from lightning_contrast.augment.fused import (
    FusedBandDropout,
    FusedBandGain,
    FusedBandIndex,
    FusedBandSwap,
    FusedCloud,
    FusedColorJitter,
    FusedCutPaste,
    FusedDeform,
    FusedDent,
    FusedErase,
    FusedFlare,
    FusedGaussianBlur,
    FusedGaussianNoise,
    FusedResizedCrop,
    FusedScratch,
    FusedShading,
    FusedSolarize,
    FusedStainJitter,
    FusedTurn,
    FusedWindow,
)


def test_in_a_sequential(emoji):
    images = emoji[:16] / 255
    before = images.clone()
    sequence = K.AugmentationSequential(
        FusedResizedCrop(24),
        FusedColorJitter(0.4, 0.4, 0.4, 0.1, grayscale=0.2),
        FusedGaussianBlur(0.5),
        FusedSolarize(0.2),
        FusedStainJitter(p=0.5),
        FusedTurn(),
    )
    torch.manual_seed(0)
    views = sequence(images)
    assert views.shape == (16, 3, 24, 24)
    assert torch.equal(images, before)
    torch.manual_seed(0)
    assert torch.equal(sequence(images), views)
    assert torch.equal(sequence(images, params=sequence._params), views)
    assert not torch.equal(sequence(images), views)


def test_each_replays_its_parameters(emoji):
    images = emoji[:8] / 255
    color = FusedColorJitter(0.4, grayscale=0.5)
    bands = (FusedBandDropout(3, keep=1), FusedBandIndex([(0, 1)]), FusedBandSwap(3, 0.5), FusedBandGain(3))
    further = (
        FusedErase(),
        FusedGaussianNoise(),
        FusedStainJitter(),
        FusedTurn(),
        FusedDeform(),
        FusedWindow(),
        *bands,
    )
    marks = (FusedCutPaste(), FusedScratch(), FusedDent(), FusedCloud(), FusedFlare(0.5), FusedShading())
    for operation in (*marks, FusedResizedCrop(20), color, FusedGaussianBlur(), FusedSolarize(), *further):
        views = operation(images)
        assert torch.equal(operation(images, params=operation._params), views)
        assert operation._params["batch_prob"].shape == (8,)


def test_masks_and_keypoints_follow_the_crop():
    """A mask is the image itself: after a nearest crop both agree; a bright pixel stays under its keypoint."""
    torch.manual_seed(0)
    images = torch.zeros(6, 3, 40, 40)
    images[:, :, 18:22, 18:22] = 1
    sequence = K.AugmentationSequential(
        FusedResizedCrop(80, (0.8, 1.0), interpolation="nearest"), data_keys=["input", "mask", "keypoints"]
    )
    points = torch.tensor([[[19.5, 19.5]]]).repeat(6, 1, 1)
    views, masks, moved = sequence(images, images[:, :1], points)
    assert torch.equal(masks, views[:, :1])
    grid = torch.stack(torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="xy"))
    centers = (grid * views[:, :1]).sum((2, 3)) / views[:, :1].sum((2, 3))
    torch.testing.assert_close(moved[:, 0], centers, atol=0.6, rtol=0)
    assert sequence._params[0].data["flip"].any()
    assert not sequence._params[0].data["flip"].all()
