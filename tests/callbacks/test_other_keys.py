"""Batches with keys of another library: images are found by name, and who cannot read a batch does not end the run."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_contrast as lc
from tests.callbacks.step_modules import QUIET
from tests.callbacks.visualization.test_view_logger import Flip

IMAGES = torch.rand(24, 3, 12, 12, generator=torch.Generator().manual_seed(0))
BOTH = {"pixel_values": IMAGES, "depth": IMAGES / 2, "labels": torch.arange(24) % 3}


class Foreign(L.LightningModule):
    """A classifier of batches that this package does not know."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head, self.steps = nn.Linear(6, 3), 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        images = batch["pixel_values"]
        images = images[0] if isinstance(images, list) else images
        return nn.functional.cross_entropy(self.head(self.encoder(images.float())), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.encoder(batch["pixel_values"].float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(keys):
    return [{key: BOTH[key][i] for key in keys} for i in range(24)]


def run(callback, keys, folder):
    module, loader = Foreign(), lambda: DataLoader(rows(keys), batch_size=8)
    trainer = L.Trainer(callbacks=[callback], default_root_dir=folder, **(QUIET | {"max_epochs": 2}))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer.fit(module, loader(), loader())
    assert module.steps == 6
    said = [str(item.message) for item in heard if "cannot read a batch" in str(item.message)]
    return said, trainer


def other():
    return DataLoader(rows(BOTH), batch_size=8)


WATCHERS = {
    "views": (lambda folder, **k: lc.ViewLogger(4, png_dir=folder, **k), "views*.png"),
    "embeddings": (lambda folder, **k: lc.EmbeddingLogger("encoder", samples=16, png_dir=folder, **k), "embeddings*"),
    "embeddings of a loader": (
        lambda folder, **k: lc.EmbeddingLogger("encoder", samples=16, dataloader=other(), png_dir=folder, **k),
        "embeddings*",
    ),
    "invariance": (
        lambda folder, **k: lc.InvarianceMonitor("encoder", samples=8, changes=["flip"], png_dir=folder, **k),
        "invariance*",
    ),
}
matrix = pytest.mark.parametrize("name", WATCHERS)


@matrix
@pytest.mark.parametrize(
    ("keys", "images"),
    [
        (("pixel_values", "labels"), None),
        (BOTH, "pixel_values"),
        (BOTH, lambda batch: batch["pixel_values"]),
    ],
    ids=["the only images", "key", "function"],
)
def test_images_are_found(name, keys, images, tmp_path):
    make, files = WATCHERS[name]
    keys = BOTH if "loader" in name and images is not None else keys
    if "loader" in name and images is None:
        pytest.skip("its own loader yields two kinds of images")
    said, _ = run(make(tmp_path, images=images), keys, tmp_path)
    assert said == []
    assert list(tmp_path.glob(files))


@matrix
def test_who_cannot_read_a_batch_says_so_once_and_logs_nothing(name, tmp_path):
    make, files = WATCHERS[name]
    said, _ = run(make(tmp_path), BOTH, tmp_path)
    assert len(said) == 1
    assert "got ['depth', 'labels', 'pixel_values']" in said[0]
    assert "`images=`" in said[0]
    assert not list(tmp_path.glob(files))


def test_views_are_created_under_the_key(tmp_path):
    augmentation = lc.ViewAugmentation(Flip(), images="pixel_values")
    _, trainer = run(augmentation, BOTH, tmp_path)
    assert trainer.global_step == 6
    data = DataLoader(rows(("pixel_values", "labels")), batch_size=8)
    augmentation = lc.ViewAugmentation(lc.augment.simclr_views(12), images="pixel_values")
    trainer = L.Trainer(callbacks=[augmentation], **(QUIET | {"max_epochs": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(lc.SimCLR("small_convnet", warmup_epochs=0, optimizer="sgd", lr=0.1), data, data)
    assert trainer.global_step == 3
