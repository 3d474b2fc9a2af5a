"""The callbacks that look on, on modules that know nothing of them, and on what is wrong."""

import warnings
from typing import Any, NamedTuple

import lightning as L
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast.callbacks import InstanceDiscriminationMonitor, OnlineKNN
from lightning_contrast.testing._trace import first_difference
from tests.callbacks import foreign
from tests.callbacks.probe_modules import images_and_labels, quiet_fit, quiet_trainer
from tests.callbacks.watchers import WATCHERS, TwoViews, data, moments, views, watchers


class Foreign(NamedTuple):
    """A module with its loaders, and the layers that a user would name."""

    make: Any
    data: Any
    library: Any
    layer: str
    pair: str
    without: tuple[str, ...] = ()


FOREIGN = {
    # A classifier sees one view: there is nothing that InstanceDiscriminationMonitor could compare, see below.
    "classifier": Foreign(
        foreign.Classifier, foreign.labelled_images, L, "encoder", "head", ("InstanceDiscriminationMonitor",)
    ),
    "lightly": Foreign(foreign.LightlySimCLR, foreign.lightly_views, pytorch_lightning, "backbone", "projection_head"),
    "gan": Foreign(foreign.GAN, foreign.labelled_images, L, "discriminator.0", "discriminator.0.3"),
}


@pytest.mark.filterwarnings("ignore:.*the loader of the bank yields views")
@pytest.mark.parametrize("case", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.slow
def test_every_callback_runs_and_changes_nothing(case, tmp_path):
    names = [name for name in WATCHERS if name not in case.without]
    alone = moments([], case.make, case.data, tmp_path, case.library)
    watching = watchers(*names, layer=case.layer, pair=case.pair)
    watched = moments(watching, case.make, case.data, tmp_path, case.library)
    assert len(alone) == 2 * 2 * 4 + 1
    never_written = "unsaved buffer `criterion.memory_bank.*"  # by lightly: it holds whatever was in memory
    assert first_difference(alone, watched, ["callback *", never_written]) is None


def test_one_view_is_nothing_to_compare():
    message = r"`features` must be a layer whose output is two views .*'encoder' is not.*got '1 view'"
    with pytest.raises(ValueError, match=message):
        quiet_fit(
            foreign.Classifier(),
            [InstanceDiscriminationMonitor("encoder", every_n_steps=1)],
            *foreign.labelled_images(),
        )


def test_neighbours_say_that_a_run_without_validation_gives_them_nothing_to_judge():
    train, _ = foreign.lightly_views()
    trainer = quiet_trainer([OnlineKNN(foreign.CLASSES)], pytorch_lightning.Trainer, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(foreign.LightlySimCLR(), train)
    said = [str(warning.message) for warning in caught]
    assert sum(words.startswith("`knn` classifies validation images, and this run has none") for words in said) == 1


# What is wrong.


class Gives(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, features):
        return self.what(features)


class Odd(TwoViews):
    """Calls layers that give what they should not."""

    def __init__(self):
        super().__init__()
        self.couple, self.couples = Gives(lambda x: (x, x)), Gives(lambda x: (x, x))
        self.sick, self.sicker = Gives(lambda x: x * float("nan")), Gives(lambda x: x * float("nan"))

    def forward(self, images):
        features = super().forward(images)
        self.couple(features), self.couples(features), self.sick(features), self.sicker(features)
        return features


WITH_FEATURES = [name for name in WATCHERS if name not in ("ViewLogger", "TrainingCostMonitor")]


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_an_unknown_layer_is_named_with_near_names(name, tmp_path):
    message = r"must name a submodule of Odd, got '(bakbone|projecter)'. Near names: '(backbone|projector)"
    with pytest.raises(ValueError, match=message):
        quiet_fit(Odd(), [*views(), *watchers(name, layer="bakbone", pair="projecter")], *data())


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_features_that_are_no_tensor_are_named(name, tmp_path):
    with pytest.raises((TypeError, ValueError), match=r"'couples?'.*got '.*tuple'"):
        quiet_fit(Odd(), [*views(), *watchers(name, layer="couple", pair="couples")], *data())


def test_features_that_are_not_finite_are_named(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watching = watchers(*WITH_FEATURES, layer="sick", pair="sicker")
        quiet_fit(Odd(), [*views(), *watching[:-1]], *data(), default_root_dir=tmp_path)
    said = [str(warning.message) for warning in caught if "NaN" in str(warning.message)]
    for callback in watching[:-1]:
        assert any(message.startswith(type(callback).__name__) for message in said), (callback, said)


@pytest.mark.parametrize("name", [name for name in WATCHERS if name.startswith("Online")])
def test_labels_out_of_range_are_named(name):
    images, labels = images_and_labels(16)
    odd = DataLoader(TensorDataset(images, labels + 1), batch_size=8)
    with pytest.raises(ValueError, match=r"`labels` must lie in 0\.\.2.* got 3"):
        quiet_fit(TwoViews(), [*views(), *watchers(name)], odd, odd)


@pytest.mark.parametrize("empty", ["training", "validation"])
def test_empty_loaders_are_no_matter(empty, tmp_path):
    nothing = DataLoader(TensorDataset(*(part[:0] for part in images_and_labels(8))), batch_size=8)
    train, val = data()
    loaders = (nothing, val) if empty == "training" else (train, nothing)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* across ranks is zero.*")
        run = quiet_fit(TwoViews(), [*views(), *watchers()[:-1]], *loaders, default_root_dir=tmp_path)
    shown = {"linear_probe/train_top1", "collapse/rankme", "contrast/top1"}
    assert (shown <= run.callback_metrics.keys()) == (empty == "validation")
    assert torch.tensor([float(value) for value in run.callback_metrics.values()]).isfinite().all()
