"""LightningDataModules for images in memory, in folders and in shards, and for videos."""

from lightning_contrast.data._folder_files import find_images
from lightning_contrast.data._folder_images import read_rgb
from lightning_contrast.data.emoji_module import EmojiDataModule
from lightning_contrast.data.folder_module import ImageFolderDataModule
from lightning_contrast.data.group_pairs import GroupPairs
from lightning_contrast.data.image_module import ImageDataModule
from lightning_contrast.data.image_text_module import ImageTextDataModule
from lightning_contrast.data.in_memory import InMemoryDataModule
from lightning_contrast.data.loading import ResumableLoader
from lightning_contrast.data.moving_emoji import MovingEmojiDataModule
from lightning_contrast.data.reweighting import balanced_weights
from lightning_contrast.data.scenes_module import EmojiScenesDataModule
from lightning_contrast.data.shard_writing import write_shards
from lightning_contrast.data.statistics import estimate_mean_std
from lightning_contrast.data.streaming_module import StreamingImageDataModule
from lightning_contrast.data.structured_batches import StructuredBatches
from lightning_contrast.data.video_module import VideoFolderDataModule

__all__ = [
    "EmojiDataModule",
    "EmojiScenesDataModule",
    "GroupPairs",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageTextDataModule",
    "InMemoryDataModule",
    "MovingEmojiDataModule",
    "ResumableLoader",
    "StreamingImageDataModule",
    "StructuredBatches",
    "VideoFolderDataModule",
    "balanced_weights",
    "estimate_mean_std",
    "find_images",
    "read_rgb",
    "write_shards",
]
