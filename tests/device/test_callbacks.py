"""The callbacks on the pretended device, in fits with validation: what their hooks read is documented, all of it."""

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.augment import simclr_cifar_views
from lightning_contrast.callbacks import MomentumUpdate, QueueUpdate
from tests.device.documented import CALLBACKS, LIGHTNING
from tests.device.pretended import PretendedDevice, in_own_process
from tests.device.runs import images, trainer
from tests.methods.cases import make

# What is made, with which method it is trained, and what else the Trainer is given.
FITS = {
    "ViewAugmentation": (lambda: lc.StepSeed(0), "SimCLR", {}),
    "MomentumUpdate": (lambda: MomentumUpdate(0.9, buffers="ema"), "BYOL", {}),
    "MomentumUpdate accumulated": (lambda: MomentumUpdate(0.9), "BYOL", {"accumulate_grad_batches": 2}),
    "QueueUpdate": (QueueUpdate, "MoCo", {}),
    "CollapseMonitor": (lambda: lc.CollapseMonitor(every_n_steps=3, samples=16), "SimCLR", {}),
    "InstanceDiscriminationMonitor": (lambda: lc.InstanceDiscriminationMonitor(every_n_steps=3), "SimCLR", {}),
    "InstanceDiscriminationMonitor queue": (lambda: lc.InstanceDiscriminationMonitor(every_n_steps=3), "MoCo", {}),
    "TrainingCostMonitor": (lambda: lc.TrainingCostMonitor(every_n_steps=3), "SimCLR", {}),
    "NonFiniteGuard": (lc.NonFiniteGuard, "SimCLR", {}),
    "NonFiniteGuard raise": (lambda: lc.NonFiniteGuard("raise"), "BYOL", {}),
    "GradientCache": (lambda: lc.GradientCache(4), "SimCLR", {}),
    "OnlineLinearProbe": (lambda: lc.OnlineLinearProbe(3, features=["backbone", "projector"]), "SimCLR", {}),
    "OnlineLinearProbe balanced": (lambda: lc.OnlineLinearProbe(3, class_weights="balanced"), "SimCLR", {}),
    "OnlineLinearProbe data": (lambda: lc.OnlineLinearProbe(3, dataloader=images(), every_n_steps=2), "SimCLR", {}),
    "OnlineLinearProbe train": (lambda: lc.OnlineLinearProbe(3, bank="train"), "SimCLR", {}),
    "OnlineKNN": (lambda: lc.OnlineKNN(3, k=[2, 5]), "SimCLR", {}),
    "OnlineKNN train": (lambda: lc.OnlineKNN(3, k=[2, 5], bank="train"), "SimCLR", {}),
    "InvarianceMonitor": (lambda: lc.InvarianceMonitor(samples=8, every_n_epochs=1), "SimCLR", {}),
    "ViewLogger": (lambda: lc.ViewLogger(4), "SimCLR", {"logger": True}),
    "EmbeddingLogger": (lambda: lc.EmbeddingLogger(samples=16, queries=2), "SimCLR", {"logger": True}),
}


@pytest.mark.parametrize("name", FITS)
@in_own_process
@pytest.mark.slow
def test_the_hooks_read_what_is_documented_and_no_more(name, tmp_path):
    callback, method, settings = FITS[name]
    if "logger" in settings:
        settings = settings | {"logger": TensorBoardLogger(tmp_path), "log_every_n_steps": 1}
    views = lc.ViewAugmentation(simclr_cifar_views(16, mean=[0.5] * 3, std=[0.2] * 3), seed=1)
    documented = LIGHTNING | CALLBACKS["ViewAugmentation"] | CALLBACKS.get(name.split()[0], {})
    with PretendedDevice(documented):
        fit = trainer(tmp_path, [views, callback()], num_sanity_val_steps=0, **settings)
        fit.fit(make(method), images(), images())


@in_own_process
@pytest.mark.slow
def test_float_images_are_looked_at_in_the_first_batch_only(tmp_path):
    views = lc.ViewAugmentation(simclr_cifar_views(16))
    loader = DataLoader([(image / 255, label) for image, label in images().dataset], batch_size=8)
    with PretendedDevice(LIGHTNING | CALLBACKS["ViewAugmentation"]) as pretended:
        trainer(tmp_path, [views], num_sanity_val_steps=0).fit(make("SimCLR"), loader, loader)
    assert 0 < pretended.used["callbacks/view_augmentation.py:_transform"] < 6
