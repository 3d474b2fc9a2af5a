"""MomentumUpdate in two processes under every strategy, against the formula on the whole weights."""

import itertools

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_contrast.callbacks import MomentumUpdate
from tests.callbacks.step_modules import Pair, loader
from tests.callbacks.strategies import STRATEGIES, TakeWeights, fit_ranks, sharded
from tests.launch import run_processes
from tests.tolerances import ROUNDED, f32

pytestmark = pytest.mark.dist


class Seen(sharded(Pair)):
    """Notes which rows this rank trained on, and validates, which leaves FSDP2's root groups gathered."""

    def __init__(self):
        super().__init__(hidden=5)  # 5 rows do not divide by 2 ranks
        self.rows = []

    def training_step(self, batch, batch_idx):
        self.rows.append(batch[0].sum().item())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.target(self.online(batch[0])[:, :1].expand(-1, 6))


def averaged(rank, name, settings):
    module, update, weights = Seen(), MomentumUpdate(0.2, 0.8, "linear"), TakeWeights()
    # The weights are taken before the update of the batch and after that of the batch before.
    trainer = fit_ranks(module, [update, weights], loader(8), name, **settings)
    return weights.history, weights.local_share, module.rows, update.updates, trainer.global_step


def check(results, update, counts, name):
    for history, share, _, updates, steps in results:
        assert updates == steps == counts
        for whole, other in zip(history, results[0][0], strict=True):
            assert all(torch.equal(whole[key], other[key]) for key in whole)  # all ranks hold the same weights
        assert share == 1 if name == "ddp" else share < 0.7  # really sharded
    assert not set(results[0][2]) & set(results[1][2])  # the ranks saw different rows
    history = results[0][0]
    targets = [key for key in history[0] if key.startswith("target")]
    average = {key: history[0][key].double() for key in targets}
    step = 0
    for before, after in itertools.pairwise(history):
        online = {key: after[key.replace("target", "online")].double() for key in targets}
        if any(not torch.equal(online[key], before[key.replace("target", "online")].double()) for key in targets):
            m = update.momentum_at(step, counts)
            average = {key: m * average[key] + (1 - m) * online[key] for key in targets}
            step += 1
        for key in targets:
            torch.testing.assert_close(after[key].double(), average[key], **f32(ROUNDED))
    assert step == counts


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_exact(name, accumulate):
    settings = {"accumulate_grad_batches": accumulate}
    results = run_processes(averaged, 2, name, settings, init=False)
    check(results, MomentumUpdate(0.2, 0.8, "linear"), 4 // accumulate, name)


class SaveAfterOneEpoch(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def stopped_and_resumed(rank, name, folder, precision):
    def run(module, update, path=None):
        weights = TakeWeights()
        callbacks = [update, weights, SaveAfterOneEpoch(folder / "stop.ckpt")]
        fit_ranks(module, callbacks, loader(8), name, max_epochs=2, ckpt_path=path, precision=precision)
        return weights.history[-1]

    update, resumed = MomentumUpdate(0.9, 1.0), MomentumUpdate(0.9, 1.0)
    whole = run(make(precision), update)
    other = make(precision)
    with torch.no_grad():
        nn.init.zeros_(other.target[0].weight)
    return whole, run(other, resumed, folder / "stop.ckpt"), (update.state_dict(), resumed.state_dict())


def make(precision):
    class Half(sharded(Pair)):
        def loss(self, batch):
            return super().loss([batch[0].bfloat16()])

    return Half() if precision == "bf16-true" else sharded(Pair)()


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "32-true") for name in STRATEGIES]
    + [("ddp", "bf16-true"), ("fsdp1 root", "bf16-true"), ("fsdp2", "bf16-true")],
)
def test_a_resumed_run_is_exact(tmp_path, name, precision):
    for whole, again, (ours, theirs) in run_processes(
        stopped_and_resumed, 2, name, tmp_path, precision, init=False, timeout=200
    ):
        assert all(torch.equal(whole[key], again[key]) for key in whole)
        assert ours["updates"] == theirs["updates"] == 8
        assert ours["masters"].keys() == theirs["masters"].keys()
        assert (len(ours["masters"]) == 4) == (precision == "bf16-true")
        assert all(torch.equal(value, theirs["masters"][key]) for key, value in ours["masters"].items())


def mixed(rank, name):
    module, update = sharded(Pair)(), MomentumUpdate(0.999, 0.999)
    weights = TakeWeights()
    fit_ranks(module, [update, weights], loader(8), name, precision="bf16-mixed")
    return weights.history[0], weights.history[-1]


@pytest.mark.parametrize("name", ["ddp", "fsdp1 root", "fsdp2"])
def test_the_target_stays_float32_in_mixed_precision(name):
    for first, last in run_processes(mixed, 2, name, init=False):
        assert last["target.0.weight"].dtype == torch.float32
        assert not torch.equal(first["target.0.weight"], last["target.0.weight"])


class HalfSharded(sharded(Pair)):
    """Only the momentum network is sharded."""

    def configure_model(self):
        fully_shard(self.target, mesh=self.device_mesh["data_parallel"])


def half_sharded(rank):
    try:
        fit_ranks(HalfSharded(), [MomentumUpdate(0.9, 1.0)], loader(8), "fsdp2")
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_pair_that_is_not_sharded_alike_is_refused():
    for message in run_processes(half_sharded, 2, init=False):
        assert "`momentum_pairs` must hold modules that are sharded alike" in message
