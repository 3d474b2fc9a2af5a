"""Modules that know nothing of the package, and a small labeled set of images, for callbacks that read features."""

import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.step_modules import QUIET

CLASSES = 3


def images_and_labels(count=48, seed=0):
    """Return uint8 images whose brightness depends on the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    images = torch.randint(0, 90, (count, 3, 8, 8), generator=generator) + 60 * labels.view(-1, 1, 1, 1)
    return images.to(torch.uint8), labels


def labelled(count=48, batch=8, seed=0, **kwargs):
    """Return a loader of (images in 0..1, labels)."""
    images, labels = images_and_labels(count, seed)
    return DataLoader(TensorDataset(images.float() / 255, labels), batch_size=batch, **kwargs)


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def classifier(base=L.LightningModule):
    """Return a supervised classifier with dropout and shuffled random numbers of its own."""

    class Classifier(base):
        def __init__(self, lr=0.1):
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.drop, self.out, self.lr = convnet(), nn.Dropout(0.2), nn.Linear(6, CLASSES), lr

        def forward(self, images):
            return self.out(self.drop(self.backbone(images)))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

        test_step = validation_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    return Classifier


class Sharding(L.LightningModule):
    """The classifier with trainable parameters in submodules of `nn.Sequential` only, as sharding wants."""

    def __init__(self, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
        self.out, self.lr = nn.Sequential(nn.Linear(16, CLASSES)), lr

    def forward(self, images):
        return self.out(self.backbone(images))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Loaders(L.LightningDataModule):
    def train_dataloader(self):
        return labelled()

    def val_dataloader(self):
        return labelled(24, seed=5)


def adversary(base=L.LightningModule):
    """Return a module of two optimizers that steps them by hand and calls its backbone twice a step."""

    class Adversary(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.backbone, self.judge, self.maker = convnet(), nn.Linear(6, 1), nn.Linear(5, 3 * 8 * 8)

        def training_step(self, batch, batch_idx):
            images, _ = batch
            judging, making = self.optimizers()
            fakes = self.maker(torch.randn(len(images), 5)).view_as(images).sigmoid()
            loss = F.softplus(-self.judge(self.backbone(images))).mean()
            loss = loss + F.softplus(self.judge(self.backbone(fakes.detach()))).mean()
            judging.zero_grad()
            self.manual_backward(loss)
            judging.step()
            making.zero_grad()
            self.manual_backward(F.softplus(-self.judge(self.backbone(fakes))).mean())
            making.step()

        def validation_step(self, batch, batch_idx):
            self.judge(self.backbone(batch[0]))

        def configure_optimizers(self):
            judging = [*self.backbone.parameters(), *self.judge.parameters()]
            return [torch.optim.Adam(judging, lr=1e-2), torch.optim.Adam(self.maker.parameters(), lr=1e-2)]

    return Adversary


def quiet_trainer(callbacks, trainer=L.Trainer, **kwargs):
    return trainer(callbacks=callbacks, **({"max_epochs": 2} | QUIET | kwargs))


def quiet_fit(module, callbacks, train=None, val=None, *, trainer=L.Trainer, ckpt_path=None, **kwargs):
    """Fit with a validation loader and return the trainer."""
    torch.manual_seed(1)
    run = trainer if not isinstance(trainer, type) else quiet_trainer(callbacks, trainer, **kwargs)
    train = labelled(shuffle=True) if train is None else train
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*number of training batches.*")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", ".*litlogger.*")
        run.fit(module, train, labelled(24, seed=5) if val is None else val, ckpt_path=ckpt_path)
    return run


def trainers():
    """Return the Trainer and the LightningModule of both libraries."""
    pl = pytest.importorskip("pytorch_lightning")
    return {"lightning": (L.Trainer, L.LightningModule), "pytorch_lightning": (pl.Trainer, pl.LightningModule)}


def random_state():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
