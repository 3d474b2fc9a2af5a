"""LightningDataModules for in-memory datasets and image folders."""

from lightning_contrast.data.emoji_module import EmojiDataModule
from lightning_contrast.data.folder_module import ImageFolderDataModule
from lightning_contrast.data.group_pairs import GroupPairs
from lightning_contrast.data.image_module import ImageDataModule
from lightning_contrast.data.in_memory import InMemoryDataModule
from lightning_contrast.data.loading import ResumableLoader
from lightning_contrast.data.statistics import estimate_mean_std

__all__ = [
    "EmojiDataModule",
    "GroupPairs",
    "ImageDataModule",
    "ImageFolderDataModule",
    "InMemoryDataModule",
    "ResumableLoader",
    "estimate_mean_std",
]
