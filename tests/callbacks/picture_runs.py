"""Runs that leave pictures behind, and ways to read them."""

import warnings
from io import BytesIO
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.probe_modules import CLASSES, images_and_labels
from tests.callbacks.step_modules import QUIET

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


class Flip:
    """Two views without chance: the image upside down, and its upper left quarter; both normalized."""

    input_spec = {"size": 8, "mean": list(MEAN), "std": list(STD)}  # noqa: RUF012

    def __call__(self, images):
        plain = self.eval_transform(images)
        return [plain.flip(2), plain[:, :, :4, :4]]

    def eval_transform(self, images):
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


class Pixels(L.LightningModule):
    """Its features are the mean color of the first view; a module that knows nothing of the package."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Linear(3, CLASSES)

    def training_step(self, batch, batch_idx):
        images = batch[0] if isinstance(batch, list | tuple) else batch
        first = images[0] if isinstance(images, list) else images
        return F.cross_entropy(self.out(self.backbone(first.float())), torch.zeros(len(first), dtype=torch.int64))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self((batch[0] if isinstance(batch, list | tuple) else batch).float())

    def forward(self, images):
        return self.backbone(images)

    def configure_optimizers(self):
        return torch.optim.SGD(self.out.parameters(), lr=0.1)


def loader(count=24, batch=8, seed=0, **settings):
    """Return a loader of uint8 images with labels."""
    return DataLoader(TensorDataset(*images_and_labels(count, seed)), batch_size=batch, **settings)


def fit(callbacks, train=None, val=None, *, module=None, folder, trainer=None, ckpt_path=None, **settings):
    """Fit for two epochs and return the trainer; pictures go below ``folder``."""
    trainer = trainer or L.Trainer(
        callbacks=callbacks, default_root_dir=folder, **({"max_epochs": 2} | QUIET | settings)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*number of training batches.*")
        warnings.filterwarnings("ignore", ".*litlogger.*")
        module = module or Pixels()
        trainer.fit(module, train or loader(), loader(seed=5) if val is None else val, ckpt_path=ckpt_path)
    return trainer


def pictures(folder):
    """Return the PNG files below a folder as arrays (H, W, 3), by name."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted(Path(folder).rglob("*.png"))}


def events(folder):
    """Return the pictures in TensorBoard's events below a folder: arrays (H, W, 3), by tag and step."""
    found = {}
    for path in Path(folder).rglob("events.out*"):
        reader = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
        for tag in reader.Tags()["images"]:
            for event in reader.Images(tag):
                found[tag, event.step] = np.asarray(Image.open(BytesIO(event.encoded_image_string)))
    return found


def tile(picture, row, column, *, edge=64, left=0, top=16):
    """Return a tile of a picture of the callbacks, (edge, edge, 3)."""
    x, y = left + 4 + column * (edge + 4), top + row * (edge + 4)
    return picture[y : y + edge, x : x + edge]


def enlarged(image, times):
    """Return an image (3, H, W), uint8 or float in 0..1, as an array (times H, times W, 3)."""
    image = image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().byte()
    return np.kron(image.permute(1, 2, 0).numpy(), np.ones((times, times, 1), dtype=np.uint8))
