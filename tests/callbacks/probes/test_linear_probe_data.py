"""The online linear probe with a labeled loader, and on several layers at once."""

import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc
from lightning_contrast.callbacks import OnlineLinearProbe
from lightning_contrast.callbacks.capture.dataloaders import LabeledStream, check_source, rank_share
from lightning_contrast.callbacks.capture.features import FeatureHook
from lightning_contrast.callbacks.capture.forward_pass import extra_pass
from tests.callbacks.probe_modules import (
    CLASSES,
    classifier,
    equal_states,
    images_and_labels,
    labelled,
    quiet_fit,
)
from tests.callbacks.probes.test_linear_probe import Records, plain_regression
from tests.callbacks.strategies import fit_ranks
from tests.launch import run_processes
from tests.tolerances import NETWORK, TRAINING, f32, near

CPU = torch.device("cpu")


class Plain(classifier()):
    """Its features are the same at every moment of a run."""

    def forward(self, images):
        return images.mean((2, 3))

    def training_step(self, batch, batch_idx):
        return self.out(self.backbone(batch[0])).square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return {"features": self(batch[0])}


def unlabelled(count=48):
    images, _ = images_and_labels(count)
    return DataLoader(TensorDataset(images.float() / 255), batch_size=8)


def test_it_learns_from_every_nth_batch_of_its_own_loader():
    data = labelled(40, seed=3)
    probe = Records(CLASSES, dataloader=data, every_n_steps=2)
    run = quiet_fit(Plain(), [probe], unlabelled(), max_epochs=4)
    given = [(images.mean((2, 3)), labels) for images, labels in data]
    batches = [given[i % 5] for i in range(12)]  # 24 steps; five batches to a pass
    assert len(probe.steps) == 12
    weight, _, mean, *_ = plain_regression(batches, probe.optimizer.param_groups[0]["lr"], 0.9, CLASSES)
    torch.testing.assert_close(probe.head.weight.detach().double(), weight, **f32(TRAINING, size=0.1))
    torch.testing.assert_close(probe.head.mean.double(), mean, **f32(NETWORK))
    assert run.callback_metrics["linear_probe/top1"] > 0.8


def resumable(make_data, tmp_path):
    """Return the labels that a whole run and a run that is stopped and resumed give the probe, and both heads."""

    def run(epochs, ckpt_path=None):
        probe, module = Records(CLASSES, dataloader=make_data(), every_n_steps=2), Plain()
        trainer = quiet_fit(module, [probe], unlabelled(), max_epochs=epochs, ckpt_path=ckpt_path)
        return probe, trainer

    whole, _ = run(4)
    stopped, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, _ = run(4, tmp_path / "stop.ckpt")
    given = [torch.cat([step.labels for step in probe.steps]) for probe in (whole, stopped, resumed)]
    assert torch.equal(given[0], torch.cat(given[1:]))
    assert equal_states(whole.head.state_dict(), resumed.head.state_dict())
    return given


@pytest.mark.parametrize("count", [40, 48], ids=["in mid-pass", "at a pass's end"])
@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_next_labelled_batch(tmp_path, count):
    first, *_ = resumable(lambda: labelled(count, seed=3, shuffle=True), tmp_path)
    assert not torch.equal(first[:24], first[count : count + 24])  # each pass has an order of its own


class Counts(DataLoader):
    """A loader with a state, that counts what it reads."""

    read = 0
    start = place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.start = state["place"]

    def __iter__(self):
        start, self.start = self.start, 0
        for place, batch in enumerate(list(super().__iter__())[start:], start + 1):
            self.place, self.read = place, self.read + 1
            yield batch


@pytest.mark.slow
def test_a_loader_with_a_state_is_given_it_back_and_reads_nothing_twice(tmp_path):
    loaders = []

    def make():
        images, labels = images_and_labels(64, seed=3)
        loaders.append(Counts(TensorDataset(images.float() / 255, labels), batch_size=8))
        return loaders[-1]

    resumable(make, tmp_path)
    assert [loader.read for loader in loaders] == [12, 6, 6]


def test_a_stream_leaves_the_global_generators_alone_and_repeats_itself():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return torch.rand(()) + random.random() + np.random.rand(), index

    def batches():
        stream = LabeledStream(DataLoader(Noisy(), batch_size=2, shuffle=True))
        stream._loader = stream.data
        return [stream.next(CPU) for _ in range(8)]

    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = batches()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.rand(5), random.random(), np.random.rand(5)
    second = batches()
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    orders = [torch.cat([indices for _, indices in first[i : i + 3]]).tolist() for i in (0, 3)]
    assert [sorted(order) for order in orders] == [list(range(6))] * 2
    assert orders[0] != orders[1]


def test_an_extra_pass_restores_every_mode_and_is_recorded_by_its_own_hooks_only():
    class Stubborn(classifier()):
        def train(self, mode=True):
            return super().train(True)

    module = Stubborn()
    module.backbone.eval()
    modes = {name: layer.training for name, layer in module.named_modules()}
    trainer = quiet_fit(Plain(), [], max_epochs=1, limit_train_batches=1)
    recording, other = FeatureHook("backbone"), FeatureHook("backbone")
    for hook in (recording, other):
        hook.attach(module)
        hook.arm(2)
    stage = trainer.state.stage
    with extra_pass(trainer, module, [recording]):
        assert not any(layer.training for layer in module.modules())
        assert not torch.is_grad_enabled()
        module(torch.rand(2, 3, 8, 8))
    assert {name: layer.training for name, layer in module.named_modules()} == modes
    assert trainer.state.stage == stage
    assert recording.called()
    assert not other.called()
    with extra_pass(trainer, module, [recording]), extra_pass(trainer, module, [other]):
        module(torch.rand(2, 3, 8, 8))
    assert other.called()
    assert not recording.paused
    assert not other.paused


def test_several_layers_of_a_method_whose_validation_does_not_call_them():
    images, labels = images_and_labels(32)
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)  # 16 pixels
    model = lc.SimCLR("small_convnet", warmup_epochs=0, optimizer="sgd", lr=0.01)
    data = DataLoader(TensorDataset(images, labels), batch_size=8)
    probes = [
        OnlineLinearProbe(CLASSES, features=["backbone", "projector"], dataloader=data),
        OnlineLinearProbe(CLASSES, features=["projector", "backbone"], name="second"),
    ]
    seen = []
    policy = lc.augment.simclr_views(16)
    plain = policy.eval_transform
    policy.eval_transform = lambda x: seen.append(len(x)) or plain(x)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8, drop_last=True)
    run = quiet_fit(model, [lc.ViewAugmentation(policy), *probes], loader, loader, max_epochs=1)
    widths = {layer: head.width for layer, head in probes[0].heads.items()}
    assert widths == {"backbone": model.feature_dim, "projector": 128}
    logged = run.callback_metrics
    for name, first in (("linear_probe", "backbone"), ("second", "projector")):
        assert logged[f"{name}/top1"] == logged[f"{name}/{first}/top1"]
        assert {f"{name}/{layer}/{key}" for layer in widths for key in ("top1", "train_loss")} <= logged.keys()
    # Sanity check, labelled batches, a bank of the probe's own loader and one of the run's, validation
    assert seen == [8] * (2 + 4 + 4 + 4 + 4)
    model.eval()
    x = plain(images)
    right = probes[0].predict(model.projector(model.backbone(x)), "projector").argmax(1) == labels
    assert logged["linear_probe/projector/top1"].item() == near(right.float().mean().item())


class Module(L.LightningDataModule):
    def setup(self, stage):
        torch.rand(3)  # as `random_split` draws
        self.ready = stage

    def train_dataloader(self):
        assert self.ready == "fit"
        return labelled(40, seed=3, shuffle=True)

    def val_dataloader(self):
        return labelled(24, seed=5)


def test_a_data_module_of_its_own():
    alone, watched = Plain(), Plain()
    quiet_fit(alone, [], unlabelled())
    probe = Records(CLASSES, dataloader=Module())
    quiet_fit(watched, [probe], unlabelled())
    assert equal_states(alone.state_dict(), watched.state_dict())
    assert len(probe.steps) == 12
    own = Module()
    with pytest.raises(ValueError, match="`dataloader` must be another DataModule than the run's, got 'Module'"):
        L.Trainer(callbacks=[OnlineLinearProbe(CLASSES, dataloader=own)], **SILENT).fit(Plain(), datamodule=own)


SILENT = {
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "accelerator": "cpu",
}


class Loaders(L.LightningDataModule):
    def train_dataloader(self):
        return unlabelled(32)

    def val_dataloader(self):
        return labelled(24, seed=5)


@pytest.mark.dist
def test_two_ranks_divide_the_labelled_loader_and_learn_the_same():
    def on_rank(rank):
        probe = Records(CLASSES, dataloader=labelled(32, seed=3, shuffle=True))
        run = fit_ranks(Plain(), [probe], Loaders(), "ddp", max_epochs=1)
        rows = torch.cat([step.features for step in probe.steps])
        return rows, probe.head.weight.detach(), run.callback_metrics["linear_probe/top1"].item()

    ranks = run_processes(on_rank, 2, init=False)
    assert torch.equal(ranks[0][1], ranks[1][1])
    assert ranks[0][2] == ranks[1][2]
    images, _ = images_and_labels(32, seed=3)
    seen = torch.cat([rows for rows, *_ in ranks])
    torch.testing.assert_close(seen.sort(0).values, (images.float() / 255).mean((2, 3)).sort(0).values)


@pytest.mark.dist
def test_only_ordinary_loaders_are_divided():
    def on_rank(rank):
        ordinary, own = labelled(8, shuffle=True), labelled(8, sampler=range(8))
        return rank_share(ordinary) is ordinary, rank_share(own) is own, len(rank_share(ordinary).sampler)

    assert run_processes(on_rank, 2) == [(False, True, 4)] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataloader": 3}, TypeError, "`dataloader` must be a DataModule or a loader, got 'int'"),
        ({"dataloader": iter([1])}, TypeError, "`dataloader` must be a loader that can be read more than once"),
        ({"every_n_steps": 2}, ValueError, "`every_n_steps` must be 1 without `dataloader`, got 2"),
        ({"dataloader": [1], "every_n_steps": 0}, ValueError, "`every_n_steps` must be >= 1"),
        ({"features": []}, ValueError, "`features` must name different layers"),
        ({"features": ["a", "a"]}, ValueError, "`features` must name different layers"),
        ({"features": ["a", 3]}, TypeError, "`features` must be the name of a submodule"),
    ],
)
def test_arguments_are_checked_when_they_are_given(arguments, error, message):
    with pytest.raises(error, match=message):
        OnlineLinearProbe(CLASSES, **arguments)


def test_a_data_module_and_a_list_of_batches_are_sources():
    for data in (Module(), [1, 2], labelled()):
        check_source("dataloader", data)


@pytest.mark.parametrize(
    ("make", "data", "error", "message"),
    [
        (Plain, list, ValueError, "`dataloader` must yield at least one batch, got 'list'"),
        (Plain, unlabelled, ValueError, "`labels` must be in the batch"),
        (Plain, lambda: [(torch.rand(2, 3, 8, 8), torch.tensor([0, 9]))], ValueError, r"must lie in 0\.\.2.*got 9"),
        (Plain, lambda: [(torch.rand(2, 3, 8, 8), torch.tensor([0]))], ValueError, "`labels` must have 2 rows, got 1"),
    ],
)
def test_bad_batches_are_named(make, data, error, message):
    with pytest.raises(error, match=message):
        quiet_fit(make(), [OnlineLinearProbe(CLASSES, dataloader=data())], unlabelled(), num_sanity_val_steps=0)


def test_a_layer_that_does_not_take_the_features_is_named():
    module = Plain()
    module.head = torch.nn.Linear(50, 2)
    probe = OnlineLinearProbe(CLASSES, features=["backbone", "head"], dataloader=labelled(16))
    with pytest.raises(ValueError, match=r"`features` must name a layer that is called in each step, got 'head'"):
        quiet_fit(module, [probe], unlabelled(), num_sanity_val_steps=0)


def test_a_module_without_forward_and_without_the_layer_is_named():
    class Bare(classifier()):
        forward = L.LightningModule.forward

        def training_step(self, batch, batch_idx):
            return {"loss": self.out(self.backbone(batch[0])).mean(), "features": batch[0].mean((2, 3))}

        def validation_step(self, batch, batch_idx):
            return {"features": batch[0].mean((2, 3))}

    probe = OnlineLinearProbe(CLASSES, features="features", dataloader=labelled(16))
    with pytest.raises(ValueError, match="`features` must be computed by `forward` or a submodule, got 'features'"):
        quiet_fit(Bare(), [probe], unlabelled(), num_sanity_val_steps=0)


def test_nan_features_of_labelled_batches_are_named_and_left_out():
    class Sick(Plain):
        def forward(self, images):
            return torch.where(torch.arange(len(images)).view(-1, 1) == 1, float("nan"), images.mean((2, 3)))

    probe = Records(CLASSES, dataloader=labelled(16))
    with pytest.warns(
        UserWarning, match=r"features 'backbone' of 1 of 8 images are NaN or infinite in `dataloader` batch 1"
    ):
        quiet_fit(Sick(), [probe], unlabelled(), num_sanity_val_steps=0, limit_val_batches=0, max_epochs=1)
    assert all(int(step.valid.sum()) == 7 for step in probe.steps)
    assert all(value.isfinite().all() for value in probe.head.state_dict().values())


def test_a_second_fit_goes_on_in_the_labelled_loader():
    probe, module = Records(CLASSES, dataloader=labelled(64, seed=3)), Plain()
    with warnings.catch_warnings():
        trainer = quiet_fit(module, [probe], unlabelled(), max_epochs=1)
        trainer.fit_loop.max_epochs = 2
        quiet_fit(module, [probe], unlabelled(), trainer=trainer)
    _, labels = images_and_labels(64, seed=3)
    assert torch.equal(torch.cat([step.labels for step in probe.steps]), torch.cat([labels, labels[:32]]))
