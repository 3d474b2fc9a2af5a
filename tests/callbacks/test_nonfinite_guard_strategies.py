"""NonFiniteGuard in two processes under DDP, FSDP1 and FSDP2: what is bad on one rank is skipped on both."""

import math
import warnings

import pytest
import torch
from torch.distributed.tensor import DTensor

from lightning_contrast.callbacks import MomentumUpdate, NonFiniteGuard
from tests.callbacks.step_modules import Pair
from tests.callbacks.strategies import TakeWeights, fit_ranks, sharded
from tests.callbacks.test_nonfinite_guard import loader, rows, without
from tests.launch import run_processes
from tests.methods.cases import make
from tests.methods.matrix_runs import batches, buffers, run, strategy
from tests.tolerances import FORMULA, assert_same_bits, f32

pytestmark = pytest.mark.dist

STRATEGIES = ("ddp", "fsdp1 root", "fsdp1 wrapped", "fsdp2")
BAD = 1  # the batch that is bad, on rank 1 only


class BadLoss(sharded(Pair)):
    """The loss of rank 1 is infinite."""

    def is_bad(self):
        return self.global_rank == 1 and self.trainer.fit_loop.total_batch_idx == BAD

    def loss(self, batch):
        return super().loss(batch) * (math.inf if self.is_bad() else 1.0)


class BadGradient(BadLoss):
    """The loss is finite and its gradient is not: the square root of 0."""

    def loss(self, batch):
        (x,) = batch
        with torch.no_grad():
            goal = self.target(x)
        out = self.online(x)
        loss = (out - goal - 1).square().mean()
        return loss + (out * 0).square().sum().sqrt() if self.is_bad() else loss


def fit_pair(rank, kind, make_module, data):
    """Return the history of the whole weights, the guard's count, the steps, and what was said."""
    guard, update, weights = NonFiniteGuard(), MomentumUpdate(0.9, schedule="constant"), TakeWeights()
    shifted = [(batch[0] + rank,) for batch in data]
    module = make_module(hidden=5)  # 5 rows do not divide by 2 ranks
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit_ranks(module, [guard, update, weights], loader(shifted), kind, use_distributed_sampler=False)
    texts = [str(entry.message) for entry in caught if "not finite" in str(entry.message)]
    counts = guard.skipped, trainer.global_step, update.updates
    return weights.history[-1], weights.local_share, counts, texts


def pairs(rank, kind, recorded):
    def quiet(text, category=None, **_):
        recorded.append(str(text))

    import lightning_contrast.callbacks.nonfinite_guard as place

    place.rank_zero_warn = quiet  # `fit_ranks` ignores all warnings
    sound = fit_pair(rank, kind, sharded(Pair), without(rows(4), [BAD]))
    found = [fit_pair(rank, kind, kind_of_fault, rows(4)) for kind_of_fault in (BadLoss, BadGradient)]
    return sound, found, recorded


@pytest.mark.parametrize("kind", STRATEGIES)
def test_both_ranks_skip_what_is_bad_on_one(kind):
    results = run_processes(pairs, 2, kind, [], init=False)
    for (expected, share, counts, _), found, texts in results:
        assert counts == (0, 3, 3)
        assert share == 1 if kind == "ddp" else share < 0.7  # really sharded
        for weights, _, counts, _ in found:
            assert counts == (1, 4, 3)  # the skipped step is a step of the run, and no update of the teacher
            assert all(torch.equal(expected[name], value) for name, value in weights.items())
        assert "epoch 0, batch 1) on rank 1: the first is the loss." in texts[0]
        # DDP and FSDP have averaged the gradients by then: the first rank that holds a bad part of them names it
        assert "batch 1) on rank 0: the first is NaN in the gradient of `online.0." in texts[1]


SETTINGS = {
    "MoCo": {},
    "DINO": {"freeze_last_layer_epochs": 0},
    "SwAV": {"queue_start_epoch": 0, "freeze_prototypes_epochs": 0},
}


class Snapshots(TakeWeights):
    """Keeps the weights and buffers before each batch, and the states of the optimizer and the learning rate."""

    def __init__(self):
        self.states, self.optimizers, self.rates = [], [], []

    def on_train_start(self, trainer, pl_module):
        pass

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.states.append(self.take(trainer, pl_module) | buffers(pl_module))
        (optimizer,) = trainer.optimizers
        entries = [entry for entry in optimizer.state.values() if entry]
        local = [{k: v.to_local() if isinstance(v, DTensor) else v for k, v in entry.items()} for entry in entries]
        tensors = [[v.clone() for v in entry.values() if isinstance(v, torch.Tensor)] for entry in local]
        self.optimizers.append([tensor for entry in tensors for tensor in entry])
        self.rates.append(optimizer.param_groups[0]["lr"])


def fit_method(rank, kind, name):
    """Return the snapshots before each of four batches, the second of which is bad on rank 1, and the counts."""
    first, second = batches(name, rank)
    views, *rest = second
    poison = torch.full_like(views[0], math.nan) if rank == 1 else views[0]
    data = [first, [[poison, *views[1:]], *rest], first, second]
    guard, snapshots = NonFiniteGuard(), Snapshots()
    module = make(name, norm=False, **SETTINGS[name])
    trainer = run(module, data, [guard, snapshots], devices=2, strategy=strategy(kind), max_steps=4, max_epochs=-1)
    return snapshots.states, snapshots.optimizers, snapshots.rates, (guard.skipped, trainer.global_step)


def methods(rank, kind):
    return {name: fit_method(rank, kind, name) for name in SETTINGS}


@pytest.mark.parametrize("kind", ["DDP", "FSDP1", "FSDP2"])
def test_a_skipped_step_feeds_no_queue_commits_no_center_and_moves_no_teacher(kind):
    """Weights, teachers, queues, centers and optimizer states before and after the bad batch are equal, bit for bit."""
    for found in run_processes(methods, 2, kind, init=False):
        for name, (states, optimizers, rates, counts) in found.items():
            assert counts == (1, 4), name
            for key, value in states[BAD].items():
                after = states[BAD + 1][key]
                if key == "prototypes.weight":  # SwAV normalizes them before each step, also before one that is skipped
                    torch.testing.assert_close(
                        after, torch.nn.functional.normalize(value, dim=1), **f32(FORMULA, size=0.1)
                    )
                else:
                    assert_same_bits(after, value, f"{name} {key}")
            assert optimizers[BAD], name
            assert all(map(torch.equal, optimizers[BAD], optimizers[BAD + 1])), name
            assert len({*rates}) == len(rates), f"{name}: the schedule moves in each step"
            after = states[BAD + 2]  # the next step moves what the skipped one has not
            moved = [key for key, value in states[BAD + 1].items() if not torch.equal(value, after[key])]
            expected = {"MoCo": ("momentum", "queue"), "DINO": ("momentum", "center"), "SwAV": ("backbone", "queue")}
            assert all(any(word in key for key in moved) for word in expected[name]), (name, moved)
