"""Fits of a real Trainer on the pretended device."""

import logging
import warnings

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, Dataset

from tests.device.pretended import NAME

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class PretendedAccelerator(Accelerator):
    """The accelerator of Lightning that trains on the pretended device."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, i) for i in range(devices)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME


def trainer(folder, callbacks=(), **settings):
    """Return a Trainer for the pretended device; nothing is logged, shown or saved."""
    strategy = SingleDeviceStrategy(torch.device(NAME, 0), accelerator=PretendedAccelerator())
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | settings
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    return L.Trainer(strategy=strategy, callbacks=list(callbacks), **quiet, **settings)


class Views(Dataset):
    """Random pairs (or more) of views with labels, and indices where a method wants them.

    Args:
        count: Views of an image; 0: the image itself as uint8.
        indices: Whether to give the index.
        size: Number of images.
    """

    def __init__(self, count, indices=False, size=24):
        generator = torch.Generator().manual_seed(0)
        self.count, self.indices = count, indices
        self.images = torch.randint(0, 256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
        self.noise = torch.rand(max(count, 1), size, 3, 16, 16, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        views = [noise[index] + self.images[index] / 255 for noise in self.noise] if self.count else self.images[index]
        return (views, index % 3, index) if self.indices else (views, index % 3)


def loader(count, indices=False):
    """Return a loader of `Views`, three batches of eight."""
    return DataLoader(Views(count, indices), batch_size=8)


def images(size=8):
    """Return a loader of single uint8 images with labels, three batches."""
    return DataLoader(Views(0), batch_size=size)
