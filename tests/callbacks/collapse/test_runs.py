"""Runs that are made to collapse are diagnosed, and healthy runs raise no alarm: real images, some seconds each."""

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_contrast as lc
from tests.callbacks.step_modules import QUIET

STEPS, EVERY, BATCH = 100, 20, 64


class NoStopGradient(lc.SimSiam):
    """SimSiam without stop-gradient on the target."""

    def training_step(self, batch, batch_idx):
        view_a, view_b = self.batch_views(batch, count=2)
        features = self.backbone(view_a)
        z_a, z_b = self.projector(features), self.projector(self.backbone(view_b))
        p_a, p_b = self.predictor(z_a), self.predictor(z_b)
        loss = -(F.cosine_similarity(p_a, z_b).mean() + F.cosine_similarity(p_b, z_a).mean()) / 2
        return {"loss": loss, "features": features.detach()}


SGD = {"optimizer": "sgd", "warmup_epochs": 0}
ADAM = {"optimizer": "adamw", "lr": 1e-3, "warmup_epochs": 0}
SMALL = {"hidden_dim": 128, "projection_dim": 128}
SIMSIAM = {"projection_dim": 128, "predictor_dim": 32, "lr": 0.05} | SGD
BYOL = {"hidden_dim": 256, "projection_dim": 64, "lr": 0.1} | SGD
DINO = {
    "num_prototypes": 256,
    "hidden_dim": 128,
    "bottleneck_dim": 64,
    "head_norm": "batch",
    "momentum": 0.99,
    "freeze_last_layer_epochs": 0,
} | ADAM

COLLAPSED = {
    "SimSiam without stop-gradient": (NoStopGradient, SIMSIAM, "dimensional collapse", "no stop-gradient"),
    "BYOL without predictor": (lc.BYOL, BYOL | {"momentum": 0.9}, "complete collapse", "no predictor"),
    "VICReg without variance": (
        lc.VICReg,
        SMALL | ADAM | {"variance_weight": 0.0},
        "complete collapse",
        "no variance term",
    ),
    "InfoNCE with too high a temperature": (
        lc.SimCLR,
        ADAM | {"temperature": 10.0, "lr": 2e-3},
        "dimensional collapse",
        "temperature too high",
    ),
    "DINO without centering": (lc.DINO, DINO | {"center_momentum": 1.0}, "prototype collapse", "no centering"),
}
HEALTHY = {
    "SimCLR": (lc.SimCLR, ADAM | {"temperature": 0.2}),
    "SimCLR, SGD": (lc.SimCLR, SGD | {"temperature": 0.5, "lr": 0.1}),
    "MoCo": (lc.MoCo, {"queue_size": 1024, "momentum": 0.99, "lr": 0.06}),
    "BYOL": (lc.BYOL, BYOL | {"momentum": 0.99}),
    "SimSiam": (lc.SimSiam, SIMSIAM),
    "VICReg": (lc.VICReg, SMALL | ADAM),
    "Barlow Twins": (lc.BarlowTwins, SMALL | ADAM),
    "alignment and uniformity": (lc.AlignUniform, ADAM),
    "SwAV": (
        lc.SwAV,
        {"num_prototypes": 64, "projection_dim": 64, "hidden_dim": 128, "queue_size": 0, "lr": 0.1} | SGD,
    ),
    "DINO": (lc.DINO, DINO),
}


def watched(method, settings, **kwargs):
    """Train on emoji and return the monitor."""
    torch.manual_seed(0)
    settings = dict(settings)
    if method is lc.BYOL and settings["momentum"] == 0.9:
        settings["predictor"] = nn.Identity()
    model = method("small_convnet", backbone_kwargs={"width": 8}, **settings)
    monitor = lc.CollapseMonitor(every_n_steps=EVERY, **kwargs)
    callbacks = [lc.ViewAugmentation(lc.augment.simclr_cifar_views(32), seed=0), monitor]
    trainer = L.Trainer(max_steps=STEPS, limit_val_batches=0, callbacks=callbacks, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=lc.data.EmojiDataModule(batch_size=BATCH))
    return monitor


@pytest.mark.slow
@pytest.mark.parametrize("name", COLLAPSED)
def test_a_collapse_is_named(name, tmp_path):
    method, settings, kind, cause = COLLAPSED[name]
    monitor = watched(method, settings, snapshot_dir=tmp_path)
    assert (kind, cause) in {(finding.kind, finding.cause) for finding in monitor.findings}
    assert {finding.cause for finding in monitor.findings} <= {cause, ""}
    assert list(tmp_path.glob("collapse_step*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_gives_no_alarm(name, tmp_path):
    monitor = watched(*HEALTHY[name], snapshot_dir=tmp_path)
    assert [str(finding) for finding in monitor.findings] == []
    assert len(monitor.history) == 1 + STEPS // EVERY
