"""The corruptions of ImageNet-C and CIFAR-10-C, on batches of images and on their device."""

from lightning_contrast.augment.corruptions.apply import CORRUPTIONS, HELD_OUT_CORRUPTIONS, corrupt

__all__ = ["CORRUPTIONS", "HELD_OUT_CORRUPTIONS", "corrupt"]
