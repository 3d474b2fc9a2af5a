"""Every callback that only looks on, in each workflow of docs/workflows.md: the run is bit for bit the run without."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner

from lightning_contrast.augment import ViewSpec, make_policy
from lightning_contrast.callbacks import ViewAugmentation
from lightning_contrast.seeding import isolated
from lightning_contrast.testing import assert_callback_changes_nothing
from tests.callbacks.step_modules import QUIET
from tests.callbacks.watchers import Images, Shows, watchers
from tests.methods.cases import make
from tests.runtime.test_workflows import IGNORED, three

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        *IGNORED,
        "ignore:CollapseMonitor",  # these networks are small
        'ignore:`knn`. with `bank="train"` it compares features of the training weights',  # of EMAWeightAveraging
        "ignore:.*this run has no validation data",
    ),
]
VIEWS = {"SimCLR": 2, "MoCo": 2, "DINO": 4}


def data(batch_size=16):
    return Images(batch_size=batch_size)  # 48 training and 24 validation images


def views(name):
    return ViewAugmentation(make_policy([ViewSpec(8, (0.5, 1.0))] * VIEWS[name], mean=None, std=None))


def silent():
    """Return all of them for a run that is too short, or has no data, for some to show something."""
    return [callback for callback in watchers() if not isinstance(callback, Shows)]


SWEEP = {"min_lr": 1e-3, "max_lr": 0.1, "early_stop_threshold": None}
GROWTH = {"init_val": 8, "max_trials": 2, "steps_per_trial": 1}
WORKFLOWS = {
    "fast_dev_run": (silent, list, {"fast_dev_run": True}),
    "overfit_batches": (watchers, list, {"overfit_batches": 2}),
    "limit_train_batches": (watchers, list, {"limit_train_batches": 2}),
    "limit_val_batches": (silent, list, {"limit_val_batches": 0}),
    "max_time": (watchers, list, {"max_time": "00:01:00:00"}),
    "BatchSizeFinder": (watchers, lambda: [BatchSizeFinder("power", **GROWTH)], {}),
    "LearningRateFinder": (watchers, lambda: [LearningRateFinder(**SWEEP, num_training_steps=3)], {}),
    "BackboneFinetuning": (watchers, lambda: [BackboneFinetuning(1, backbone_initial_lr=0.02)], {}),
    "StochasticWeightAveraging": (
        watchers,
        lambda: [StochasticWeightAveraging(0.01, 0.5, annealing_epochs=1)],
        {"max_epochs": 3},
    ),
    "EMAWeightAveraging": (watchers, lambda: [EMAWeightAveraging(decay=0.5)], {}),
    "GradientAccumulationScheduler": (watchers, lambda: [GradientAccumulationScheduler({0: 1, 1: 2})], {}),
}


@three
@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_watched_run_is_the_run(name, workflow):
    watching, changes, settings = WORKFLOWS[workflow]
    assert_callback_changes_nothing(
        watching,
        lambda: make(name),
        data,
        lambda: [views(name), *changes()],
        ignore=["callback `Timer`*"],  # of `max_time`
        **settings,
    )


@three
@pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
def test_a_tuner_finds_the_same_for_a_watched_run(name, tune, tmp_path):
    """And the fit that follows is the same, and watched."""
    results = []
    for watching in ([], watchers()):
        with isolated(0):
            module, images = make(name), data(8)
            callbacks = [views(name), *watching]
            trainer = L.Trainer(**QUIET | {"max_epochs": 2}, callbacks=callbacks, default_root_dir=tmp_path)
            if tune == "lr_find":
                found = Tuner(trainer).lr_find(module, images, **SWEEP, num_training=4).results["loss"]
            else:
                found = Tuner(trainer).scale_batch_size(module, datamodule=images, mode="power", **GROWTH)
            trainer.fit(module, images)
            weights = {key: value.clone() for key, value in module.state_dict().items()}
            results.append((found, module.lr, images.batch_size, trainer.global_step, weights))
    (*alone, own), (*watched, other) = results
    assert alone == watched
    assert alone[3] == (12 if tune == "lr_find" else 6)
    assert own.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in own.items())
