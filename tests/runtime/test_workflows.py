"""What Lightning users do with a Trainer: each works with three methods, or is refused at the start in one sentence."""

import inspect
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, IterableDataset

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.testing import run_processes
from tests.methods.cases import CASES, make
from tests.rank_runs import on_ranks
from tests.runtime.test_schedules_follow_the_run import BATCH, IMAGES, NAMES, QUIET, Views
from tests.tolerances import ROUNDED, near, near64

IGNORED = (
    "ignore:.*does not have many workers",
    "ignore:.*Consider setting",
    "ignore:SWA is currently only supported every epoch",
    "ignore:.*Swapping",
    "ignore:.*shuffling",
    "ignore:You're using the WeightAveraging callback with a model that overrides the configure_model",
    "ignore:The provided params to be frozen already exist",  # BatchNorm, which it does not freeze
)
pytestmark = pytest.mark.filterwarnings(*IGNORED, "ignore:You defined a `validation_step` but have no")
METHODS = ("SimCLR", "MoCo", "DINO")
three = pytest.mark.parametrize("name", METHODS)


class Losses(L.Callback):
    """Records losses, and the number of EMA updates and queue pushes that each epoch made."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def onlookers():
    return [lc.callbacks.CollapseMonitor()]


def fit(name, *callbacks, module=None, data=None, **settings):
    """Fit with every onlooker that needs no labels; return the module and what was seen."""
    seen, module = Losses(), module or make(name, warmup_epochs=0)
    trainer = L.Trainer(**(QUIET | {"max_epochs": 3} | settings), callbacks=[seen, *onlookers(), *callbacks])
    trainer.fit(module, Views(name) if data is None else data)
    return module, seen


@three
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
        ({"overfit_batches": 2}, 6),
        ({"limit_train_batches": 0.5}, 6),
        ({"limit_train_batches": 1, "max_epochs": 5}, 5),
        ({"limit_train_batches": 0}, 0),
        ({"max_time": "00:01:00:00"}, 12),
    ],
)
def test_short_runs(name, settings, steps):
    module, seen = fit(name, **settings)
    assert len(seen.losses) == module.trainer.global_step == steps
    assert all(map(math.isfinite, seen.losses))
    assert not steps or seen.losses[0] > 0.01
    assert seen.rates == near64([0.05 * module.lr_factor(step + 1, 0, steps) for step in range(steps)])  # to its end


@three
def test_fast_dev_run_works_with_a_given_warmup_too(name):
    module, _ = fit(name, module=make(name, warmup_epochs=7), fast_dev_run=True)
    assert module.trainer.global_step == 1


def test_a_default_warmup_is_cut_and_a_given_one_is_refused(monkeypatch):
    said = []
    monkeypatch.setattr("lightning_contrast.runtime.run_length.rank_zero_info", said.append)
    module = lc.SimCLR(CASES["SimCLR"].backbone(False), optimizer="sgd", lr=1.0)  # 10 epochs
    rates = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    fit("SimCLR", Rates(), module=module, max_epochs=5)
    assert rates == near64([lc.optim.warmup_cosine(step, 2, 20) for step in range(20)])
    (line,) = said
    assert "The warm-up of 10 epochs (40 steps) does not fit into the 20 steps of the run and is cut to 2 steps" in line
    words = r"`warmup_epochs` must fit into the 20 steps of the run, got '9 epochs of 4 steps'"
    with pytest.raises(ValueError, match=words):
        fit("SimCLR", module=make("SimCLR", warmup_epochs=9), max_epochs=5)


@pytest.mark.parametrize(
    ("name", "argument", "reached", "beyond"),
    [
        ("DINO", "freeze_last_layer_epochs", 2, 3),
        ("DINO", "warmup_teacher_temperature_epochs", 2, 4),
        ("SwAV", "freeze_prototypes_epochs", 2, 3),
        ("MoCHi", "start_epoch", 2, 3),
        ("DINOv3", "gram_start_epoch", 2, 80),
    ],
)
@pytest.mark.slow
def test_an_epoch_that_the_run_does_not_reach_is_told_of(name, argument, reached, beyond, monkeypatch):
    """Three epochs, 0 to 2: a loss that begins later is never part of the loss, and a layer stays frozen."""
    said, warned = [], []
    monkeypatch.setattr("lightning_contrast.runtime.run_length.rank_zero_info", said.append)
    monkeypatch.setattr("lightning_contrast.runtime.run_length.rank_zero_warn", warned.append)
    default = inspect.signature(getattr(lc, name)).parameters[argument].default
    for epochs, settings in ((reached, {}), (beyond, {"fast_dev_run": True}), (beyond, {})):
        said.clear()
        warned.clear()
        fit(name, module=make(name, warmup_epochs=0, **{argument: epochs}), **settings)
        told = [line for line in said + warned if f"`{argument}`" in line]
        assert len(told) == (epochs == beyond and not settings)
    assert f"The run ends before epoch {beyond}: what `{argument}` begins or ends there never" in told[0]
    assert (told[0] in said) == (beyond == default)


def test_an_argument_of_a_subclass_may_have_such_a_name(monkeypatch):
    """None and a list are no epochs, and a negative number is none that begins."""
    said = []
    monkeypatch.setattr("lightning_contrast.runtime.run_length.rank_zero_warn", said.append)
    settings = {"a_start_epoch": [9, 10], "b_start_epoch": None, "c_start_epoch": -1, "d_start_epoch": 9}
    module = make("SimCLR", warmup_epochs=0)
    module.hparams.update(settings)
    fit("SimCLR", module=module)
    assert (
        [line for line in said if "_start_epoch" in line] == [line for line in said if "`d_start_epoch`" in line] != []
    )


def test_a_queue_that_is_off_is_not_told_of(monkeypatch):
    said = []
    monkeypatch.setattr("lightning_contrast.runtime.run_length.rank_zero_info", said.append)
    for size in (0, 8):
        fit("SwAV", module=make("SwAV", warmup_epochs=0, queue_size=size, queue_start_epoch=15))
        assert len([line for line in said if "`queue_start_epoch`" in line]) == (size > 0)


def test_the_defaults_number_is_refused_if_it_is_given():
    """A default is known by not being given: not by its value, nor by the value in a checkpoint or a configuration."""
    words = r"`warmup_epochs` must fit into the 20 steps of the run, got '10 epochs of 4 steps'"
    given, default = make("SimCLR", warmup_epochs=10), make("SimCLR", warmup_epochs=None)
    assert given.warmup_epochs == default.warmup_epochs == 10
    again, other = (
        lc.SimCLR(**(dict(m.hparams) | {"backbone": CASES["SimCLR"].backbone(True)})) for m in (given, default)
    )
    later = make("SimCLR", warmup_epochs=None)
    later.warmup_epochs = 10
    for module in (given, again, later):
        with pytest.raises(ValueError, match=words):
            fit("SimCLR", module=module, max_epochs=5)
    for module in (default, other):
        fit("SimCLR", module=module, max_epochs=5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_constant_rate_is_an_argument_of_every_method(name):
    """After its warm-up, also in a run without an end; None is the method's schedule."""
    module = make(name, warmup_epochs=1, lr_schedule="constant")
    assert module.hparams.lr_schedule == module.lr_schedule == "constant"
    loader = DataLoader(Views(name).items, batch_size=BATCH)
    _, seen = fit(name, module=module, data=loader, max_epochs=3)
    peak = module.lr
    assert seen.rates[3:] == near64([peak] * 9)
    assert seen.rates[0] < peak
    usual = fit(name, module=make(name, warmup_epochs=1), data=loader, max_epochs=3)[1].rates[-1]
    assert usual < peak / 2 or (name == "DINOv3" and usual == near64(peak))  # whose published rate is constant
    with pytest.raises(ValueError, match=r"`lr_schedule` must be one of .*, got 'linear'"):
        make(name, lr_schedule="linear")


@three
def test_endless_runs_and_loaders_without_length(name):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from Views(name).items

    loader = DataLoader(Stream(), batch_size=BATCH)
    _, seen = fit(name, data=loader, max_steps=3, max_epochs=-1)
    assert len(seen.losses) == 3
    words = "`max_epochs` must be replaced by `max_steps` for a training loader without a length, got 2"
    with pytest.raises(ValueError, match=words):
        fit(name, data=loader, max_epochs=2)
    with pytest.raises(ValueError, match=r"`max_epochs` must end the run for the schedules, got -1|in an endless run"):
        fit(name, max_epochs=-1, max_time="00:00:01:00")
    if name != "DINO":  # whose momentum needs the end of the run, too
        module = make(name, warmup_epochs=0, lr_schedule="constant")
        _, seen = fit(name, module=module, data=loader, max_epochs=2)
        assert seen.rates == [0.05] * 2 * (IMAGES // BATCH)

        class Stops(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                trainer.should_stop = trainer.global_step == 6

        endless = make(name, warmup_epochs=0, lr_schedule="constant")
        _, seen = fit(name, Stops(), module=endless, max_epochs=-1, max_time="00:01:00:00")
        assert seen.rates == [0.05] * 6


@three
def test_lr_find_measures_the_method(name, tmp_path):
    """At a learning rate that hardly rises the losses are those of a fit; an empty queue would give others."""
    lowest, highest = 2e-6, 2.1e-6
    settings = QUIET | {"default_root_dir": tmp_path}
    module = make(name, warmup_epochs=9)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer = L.Trainer(**settings, max_epochs=10, callbacks=onlookers())
    tuner = Tuner(trainer)
    sweep = {"min_lr": lowest, "max_lr": highest, "num_training": 20, "early_stop_threshold": None}
    found = tuner.lr_find(module, Views(name), **sweep)
    assert len(found.results["loss"]) == 20
    alike = make(name, warmup_epochs=0, lr=lowest, lr_schedule="constant")
    _, seen = fit(name, module=alike, max_epochs=5)
    average = 0.0
    for count, loss in enumerate(seen.losses, 1):
        average = 0.98 * average + 0.02 * loss
        smoothed = average / (1 - 0.98 ** (count + 1))  # as Lightning does it
        assert found.results["loss"][count - 1] == pytest.approx(smoothed, rel=0.05)
    assert lowest <= module.lr <= highest
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@three
@pytest.mark.slow
def test_scale_batch_size(name, tmp_path):
    module, data = make(name, lr=None, warmup_epochs=1), Views(name, batch_size=4)
    trainer = L.Trainer(**QUIET, max_epochs=2, default_root_dir=tmp_path)
    Tuner(trainer).scale_batch_size(module, datamodule=data, init_val=4, max_trials=2, steps_per_trial=1)
    assert data.batch_size == 8
    trainer.fit(module, data)
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == near64(lc.optim.scaled_lr(module.base_lr, 8))


@three
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_backbone_finetuning(name, optimizer):
    tune = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.02, lambda_func=lambda epoch: 1.0)
    module = make(name, warmup_epochs=0, optimizer=optimizer)
    before = next(module.backbone.parameters()).detach().clone()
    seen = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([group["lr"] for group in optimizer.param_groups])

        def on_train_epoch_end(self, trainer, pl_module):
            moved = not torch.equal(next(pl_module.backbone.parameters()), before)
            assert moved == (trainer.current_epoch >= 1)

    fit(name, Rates(), tune, module=module)
    factor = [rates[0] for rates in seen]
    assert [len(rates) for rates in seen] == [2] * 4 + [4] * 8
    assert all(rates[2] == rates[3] for rates in seen[4:])
    added = [rates[3] for rates in seen[4:8]]
    assert added == near64([0.02 * now / factor[4] for now in factor[4:8]])  # in proportion to the others


def decay_of(module, optimizer):
    """Return the weight decay of each trainable parameter by name; each parameter is in one group."""
    names = {parameter: key for key, parameter in module.named_parameters() if parameter.requires_grad}
    groups = [(names[p], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(groups) == len(dict(groups)) == len(names)
    return dict(groups)


def backbone_finetuning():
    return BackboneFinetuning(1, lambda_func=lambda epoch: 0.5, backbone_initial_lr=0.02)


@three
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_an_added_backbone_has_the_weight_decay_of_the_method(name, optimizer):
    """It is the one without `BackboneFinetuning`, in every step of its schedule."""

    class Decays(L.Callback):
        def __init__(self):
            self.seen, self.rates = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(decay_of(pl_module, trainer.optimizers[0]))
            self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    usual, added = Decays(), Decays()
    for watch, callbacks in ((usual, []), (added, [backbone_finetuning()])):
        fit(name, watch, *callbacks, module=make(name, warmup_epochs=0, optimizer=optimizer, weight_decay=0.03))
    assert added.seen[4:] == usual.seen[4:]
    decays = added.seen[-1]
    assert decays["backbone.layers.0.weight"] > decays["backbone.layers.0.bias"] == 0
    assert all(rates[2] == rates[3] for rates in added.rates[4:])
    assert added.rates[4][3] > 0


class FirstOfEpoch(L.Callback):
    """Records the learning rates before each epoch's first batch, as `LearningRateMonitor` does, and saves an epoch."""

    def __init__(self, path=None):
        self.path, self.rates = path, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_epoch_end(self, trainer, pl_module):
        if self.path is not None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


@three
def test_backbone_finetuning_resumes(name, tmp_path):
    """Lightning alone leaves the backbone frozen after a resume."""
    weights, rates = [], []
    for save, load in ((tmp_path / "second.ckpt", None), (None, tmp_path / "second.ckpt")):
        module, watch = make(name, warmup_epochs=0, optimizer="adamw"), FirstOfEpoch(save)
        trainer = L.Trainer(**(QUIET | {"max_epochs": 4}), callbacks=[watch, backbone_finetuning()])
        trainer.fit(module, Views(name), ckpt_path=load, weights_only=True)
        assert all(parameter.requires_grad for parameter in module.backbone.parameters())
        weights.append(module.state_dict())
        rates.append(watch.rates[-2:])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert rates[0] == rates[1]


@three
def test_rates_of_an_added_backbone_are_those_that_the_callback_sets(name):
    watch = FirstOfEpoch()
    fit(name, backbone_finetuning(), watch, module=make(name, warmup_epochs=0))
    assert [rates[2:] for rates in watch.rates[1:]] == [[0.02] * 2, [0.01] * 2]


def finetune_on_ranks(rank):
    module = make("SimCLR", norm=False, warmup_epochs=0)
    trainer = L.Trainer(**(QUIET | on_ranks(2) | {"max_epochs": 2}), callbacks=[backbone_finetuning()])
    with pytest.raises(ValueError, match="`BackboneFinetuning` must run on one rank"):
        trainer.fit(module, Views("SimCLR"))


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore")
def test_backbone_finetuning_is_refused_on_several_ranks():
    run_processes(finetune_on_ranks, 2, init=False)


@three
def test_stochastic_weight_averaging(name):
    """The additional epoch for BatchNorm moves neither the teacher nor the queue, and does not count for schedules."""
    seen, states, averaged = [], [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(trainer.callback_metrics.get("train/momentum", 0)))

        def on_train_epoch_end(self, trainer, pl_module):
            names = [key for key in pl_module.state_dict() if "queue" in key or "center" in key]
            states.append({key: pl_module.state_dict()[key].clone() for key in names})

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 3 and batch_idx == 0:
                averaged.extend(p.detach().clone() for p in pl_module.parameters())

    update = MomentumUpdate()
    module = make(name, norm=True, warmup_epochs=0)
    callbacks = [update] if hasattr(module, "momentum_pairs") else []
    fit(name, Watch(), *callbacks, StochasticWeightAveraging(0.01, 0.5, annealing_epochs=1), module=module)
    assert len(states) == 4
    assert all(torch.equal(a, b) for a, b in zip(averaged, module.parameters(), strict=True))
    assert len(seen) == 16
    assert update.updates == (12 if callbacks else 0)
    assert all(torch.equal(value, states[2][key]) for key, value in states[3].items())
    if name == "DINO":
        expected = lc.optim.momentum_schedule(11, 12, module.schedules.momentum)
        assert seen[-1] == near(expected, ROUNDED)  # metrics are float32


@three
def test_ema_weight_averaging(name):
    _, plain = fit(name)
    _, averaged = fit(name, EMAWeightAveraging(decay=0.5))
    assert averaged.losses == plain.losses


def test_a_changing_accumulation_needs_an_absolute_rate():
    with pytest.raises(ValueError, match="`lr` must be given if the gradient accumulation changes between epochs"):
        fit("MoCo", GradientAccumulationScheduler({0: 1, 1: 2}), module=make("MoCo", lr=None))


def test_momentum_update_by_hand_takes_the_modules_momentum():
    for name, expected in (("BYOL", 0.5), ("MoCo", 0.5), ("DINO", 0.5), ("MSN", 0.5)):
        module, update = make(name, momentum=0.5), MomentumUpdate()
        own = next(c for c in module.default_callbacks() if isinstance(c, MomentumUpdate))
        fit(name, update, module=module, max_epochs=1)
        assert (update.start, update.end, update.schedule) == (own.start, own.end, own.schedule)
        assert update.start == expected
    with pytest.warns(UserWarning, match=r"given start=0\.9 \(not 0\.5\), which takes precedence .* of BYOL") as said:
        fit("BYOL", MomentumUpdate(0.9), module=make("BYOL", momentum=0.5), max_epochs=1)
    assert len([w for w in said if "precedence" in str(w.message)]) == 1
