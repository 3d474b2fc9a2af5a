"""LightningDataModules for small sets in memory and for folders of images."""

from lightning_contrast.data.emoji_module import EmojiDataModule

__all__ = ["EmojiDataModule"]
