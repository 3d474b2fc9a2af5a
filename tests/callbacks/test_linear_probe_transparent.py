"""A run that is watched ends with the weights of a run that is not, bit for bit."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from tests.callbacks.probe_modules import (
    CLASSES,
    adversary,
    classifier,
    equal_states,
    labelled,
    labelled_probes,
    probes,
    quiet_fit,
)
from tests.callbacks.strategies import STRATEGIES, TakeWeights, fit_ranks, sharded
from tests.launch import run_processes

MAKERS = {"automatic": classifier, "manual": adversary}


def trainers():
    pl = pytest.importorskip("pytorch_lightning")
    return {"lightning": (L.Trainer, L.LightningModule), "pytorch_lightning": (pl.Trainer, pl.LightningModule)}


def random_state():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("library", ["lightning", "pytorch_lightning"])
@pytest.mark.parametrize("optimization", ["automatic", "manual"])
def test_weights_and_random_numbers_are_those_of_a_run_without_probes(library, optimization):
    trainer, base = trainers()[library]
    make = MAKERS[optimization](base)
    alone, watched = make(), make()
    quiet_fit(alone, [], trainer=trainer)
    after_alone = random_state()
    run = quiet_fit(watched, [*probes(), *labelled_probes()], trainer=trainer)
    after_watched = random_state()
    assert equal_states(alone.state_dict(), watched.state_dict())
    assert torch.equal(after_alone[0], after_watched[0])
    assert after_alone[1:] == after_watched[1:]
    assert not equal_states(make().state_dict(), watched.state_dict())  # it did learn
    assert {"linear_probe/top1", "knn/top1", "first_layer/top1"} <= run.callback_metrics.keys()
    assert {"labelled/backbone.0/top1", "fresh/k5_t0.07/top1", "other/top1"} <= run.callback_metrics.keys()
    assert all(not module._forward_hooks for module in watched.modules())


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
        {"val_check_interval": 2, "num_sanity_val_steps": 0},
        {"inference_mode": False},
    ],
    ids=str,
)
def test_weights_are_the_same_under_other_settings(settings):
    alone, watched = classifier()(), classifier()()
    quiet_fit(alone, [], **settings)
    run = quiet_fit(watched, [*probes(), *labelled_probes()], **settings)
    assert equal_states(alone.state_dict(), watched.state_dict())
    assert run.callback_metrics["linear_probe/train_loss"].isfinite()


def compiled_and_not(rank, what):
    def compiled():
        torch._dynamo.reset()
        module = classifier()()
        if what == "module":
            return module, torch.compile(module, backend="eager")
        module.backbone = torch.compile(module.backbone, backend="eager")
        return module, module

    (alone, fitted), (watched, fitted_watched) = compiled(), compiled()
    quiet_fit(fitted, [])
    run = quiet_fit(fitted_watched, probes()[:2])
    plain = quiet_fit(classifier()(), probes()[:2])
    metrics = [{key: value.item() for key, value in each.callback_metrics.items()} for each in (run, plain)]
    return equal_states(alone.state_dict(), watched.state_dict()), *metrics


@pytest.mark.dist
@pytest.mark.parametrize("what", ["module", "backbone"])
def test_weights_are_the_same_when_compiled(what):
    # In a process of its own: once a compiled module was trained, autograd refuses to run in forks of the process.
    ((same, compiled, plain),) = run_processes(compiled_and_not, 1, what, init=False)
    assert same
    assert compiled == pytest.approx(plain)  # the probes saw the features of every step


def test_nothing_of_a_probe_is_in_the_module_or_its_checkpoint(tmp_path):
    module = classifier()()
    run = quiet_fit(module, probes())
    run.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == classifier()().state_dict().keys()
    assert len(checkpoint["optimizer_states"]) == 1
    tensors = checkpoint["callbacks"]["OnlineLinearProbe[linear_probe]"]["head"]
    assert tensors["weight"].shape == (CLASSES, 6)


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


def weights_of_rank(rank, name, watched):
    take = TakeWeights()
    module = sharded(Sharding)() if name != "ddp" else classifier()()
    callbacks = [take, *([*probes()[:2], *labelled_probes()] if watched else [])]
    run = fit_ranks(module, callbacks, Loaders(), name, max_epochs=2)
    head = callbacks[1].head.weight.detach() if watched else None
    return take.history[-1], head, {key: float(value) for key, value in run.callback_metrics.items()}


@pytest.mark.dist
@pytest.mark.parametrize("name", STRATEGIES)
def test_weights_are_the_same_on_two_ranks(name):
    alone = run_processes(weights_of_rank, 2, name, False, init=False)
    watched = run_processes(weights_of_rank, 2, name, True, init=False)
    for rank in range(2):
        assert equal_states(alone[rank][0], watched[rank][0])
    assert torch.equal(watched[0][1], watched[1][1])  # the classifier too is the same on both ranks
    assert watched[0][2] == watched[1][2]
    logged = {"linear_probe/top1", "linear_probe/train_top1", "knn/top1", "labelled/backbone/top1", "fresh/top1"}
    assert logged <= watched[0][2].keys()
