"""A temperature may be a number, learned, or a schedule, in every method that divides similarities by one."""

import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_contrast as lc
from lightning_contrast.cli import main
from lightning_contrast.nn import LearnedTemperature, ScheduledTemperature
from tests.methods.cases import CASES, TinyBackbone, fill_queue, make
from tests.methods.test_contract import BATCHES, assert_equal_states, data, run_step, state, step_batch, trainer
from tests.tolerances import NETWORK, ROUNDED, f64, near

NAMES = ["SimCLR", "MoCo", "MoCo symmetric", "MoCo masked", "MoCHi", "NNCLR", "SupCon", "MoCoV3", "NPID"]
every = pytest.mark.parametrize("name", NAMES)


def loss_at(name, temperature):
    """Return the module and its loss, with projections that are spread as those of a trained network are."""
    torch.manual_seed(1)
    spread = nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8))
    module = fill_queue(make(name, norm=False, projector=spread, temperature=temperature).double())
    return module, run_step(module, step_batch(CASES[name], torch.float64))["loss"]


@every
def test_a_learned_temperature_gets_the_gradient_of_the_loss(name):
    """Finite differences; a factor of the loss (MoCo v3, SupCon) stays as it was at the temperature itself."""
    step = 1e-5
    module, loss = loss_at(name, LearnedTemperature(0.3))
    loss.backward()
    here = module.temperature().item()
    factor = {"MoCoV3": lambda t: t / here, "SupCon": lambda t: t / here}.get(name, lambda t: 1.0)
    up, down = (loss_at(name, t)[1].item() / factor(t) for t in (here * (1 + step), here / (1 + step)))
    slope = (up - down) / (2 * torch.tensor(1 + step, dtype=torch.float64).log().item())  # over log temperature
    assert abs(slope) > 1e-3
    assert module.temperature.log_temperature.grad.item() == near(slope, ROUNDED)
    torch.testing.assert_close(loss, loss_at(name, here)[1], **f64(NETWORK))


@every
def test_a_schedule_sets_the_temperature_of_the_step(name, monkeypatch):
    monkeypatch.setattr(L.LightningModule, "global_step", 30)
    for schedule in (ScheduledTemperature(0.5, 0.1, steps=60), lambda step: step / 100):
        torch.testing.assert_close(loss_at(name, schedule)[1], loss_at(name, 0.3)[1], **f64(NETWORK))


class Record(L.Callback):
    """What was logged in each batch."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(trainer.callback_metrics["train/temperature"]))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("schedule", [ScheduledTemperature(0.5, 0.1), lambda step: 0.5 - 0.05 * step])
@pytest.mark.slow
def test_a_schedule_counts_optimizer_steps_and_goes_on_after_a_resume(schedule, tmp_path):
    steps = 3 * BATCHES // 2
    own = isinstance(schedule, ScheduledTemperature)
    expected = [schedule(k // 2, steps) if own else schedule(k // 2) for k in range(3 * BATCHES)]

    def fit(module, folder, **kwargs):
        every = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 3}
        record, saved = Record(), ModelCheckpoint(tmp_path / folder, **every)
        run = trainer(tmp_path, CASES["SimCLR"], epochs=3, callbacks=[record, saved], accumulate_grad_batches=2)
        run.fit(module, data("SimCLR"), **kwargs)
        return record.values

    whole, resumed = make("SimCLR", temperature=schedule), make("SimCLR", temperature=schedule)
    assert fit(whole, "whole") == near(expected, ROUNDED)
    stopped = {"ckpt_path": tmp_path / "whole" / "step=3.ckpt", "weights_only": True}
    assert fit(resumed, "resumed", **stopped) == near(expected[6:], ROUNDED)
    assert_equal_states(state(whole), state(resumed))


@pytest.mark.slow
def test_a_learned_temperature_moves_is_logged_and_is_saved(tmp_path):
    record, module = Record(), make("SimCLR", temperature=LearnedTemperature(0.3))
    fit = trainer(tmp_path, CASES["SimCLR"], epochs=1, callbacks=[record], limit_val_batches=0)
    fit.fit(module, data("SimCLR"))
    assert record.values[0] == pytest.approx(0.3)
    assert len(set(record.values)) == BATCHES
    (group,) = [g for g in fit.optimizers[0].param_groups if module.temperature.log_temperature in set(g["params"])]
    assert group["weight_decay"] == 0
    assert (group["initial_lr"], group["adapt"]) == (1e-3, False)
    assert fit.optimizers[0].param_groups[0]["initial_lr"] != group["initial_lr"]
    fit.save_checkpoint(tmp_path / "learned.ckpt")
    arguments = {"backbone": TinyBackbone(norm=True), "weights_only": True}
    again = lc.SimCLR.load_from_checkpoint(tmp_path / "learned.ckpt", temperature=LearnedTemperature(), **arguments)
    assert again.temperature().item() == module.temperature().item()
    with pytest.raises(ValueError, match=r"got \{'temperature': 'LearnedTemperature'\}. Call `load_from_checkpoint"):
        lc.SimCLR.load_from_checkpoint(tmp_path / "learned.ckpt", **arguments)


def test_a_number_is_not_logged(tmp_path):
    fit = trainer(tmp_path, CASES["SimCLR"], epochs=1, limit_train_batches=1, limit_val_batches=0)
    fit.fit(make("SimCLR", temperature=0.3), data("SimCLR"))
    assert "train/temperature" not in fit.callback_metrics


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("0.25", 0.25),
        ("{class_path: lightning_contrast.nn.LearnedTemperature, init_args: {init: 0.2}}", LearnedTemperature(0.2)),
        (
            "{class_path: lightning_contrast.nn.ScheduledTemperature, init_args: {start: 0.5, end: 0.1}}",
            ScheduledTemperature(0.5, 0.1),
        ),
    ],
)
def test_every_form_can_be_written_in_a_configuration(written, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    (tmp_path / "config.yaml").write_text(
        f"""
seed_everything: 0
model:
  class_path: MoCo
  init_args:
    backbone: small_convnet
    queue_size: 64
    temperature: {written}
    weighting: {{kind: hard, beta: 2.0}}
    mask_same: label
data:
  class_path: EmojiDataModule
trainer: {{accelerator: cpu, logger: false, enable_checkpointing: false}}
"""
    )
    cli = main(["--config", str(tmp_path / "config.yaml")], run=False)
    assert repr(cli.model.temperature) == repr(expected)
    assert cli.model.weighting == lc.losses.Negatives("hard", beta=2.0)
    assert cli.model.mask_same == "label"
    saved = {"state_dict": cli.model.state_dict(), "hyper_parameters": dict(cli.model.hparams)}
    torch.save(saved | {"pytorch-lightning_version": "2.5.0"}, tmp_path / "cli.ckpt")
    again = type(cli.model).load_from_checkpoint(tmp_path / "cli.ckpt", weights_only=True)  # built as it was then
    assert repr(again.temperature) == repr(expected)


@every
@pytest.mark.parametrize("temperature", [0.0, -1, float("nan")])
def test_a_number_must_be_positive(name, temperature):
    with pytest.raises(ValueError, match="`temperature` must be > 0"):
        make(name, temperature=temperature)


@every
def test_a_wrong_type_is_refused(name):
    with pytest.raises(TypeError, match="`temperature` must be a number, a module or a function, got 'str'"):
        make(name, temperature="0.1")


def test_noise_contrastive_estimation_needs_a_number():
    with pytest.raises(ValueError, match="`temperature` must be a number with `num_negatives`, got"):
        make("NPID noise", temperature=LearnedTemperature())
