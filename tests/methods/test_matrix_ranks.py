"""Cells of the matrix that need two processes: DDP, FSDP1 and FSDP2 against one process and against each other."""

import functools
import tempfile
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.launch import run_processes
from tests.methods.cases import make
from tests.methods.matrix_runs import PATIENCE, STEPS, assert_close, largest, primary, record
from tests.methods.test_contract import methods
from tests.tolerances import CANCELLING, NETWORK, assert_same_bits, bound

pytestmark = pytest.mark.dist

OWN_CLIPPING = {name: {"clip_grad": 0.05} for name in ("DINO", "IBOT", "DINOv2", "DINOv3", "MSN")}
"""The methods that clip gradients themselves do it in each step."""


def of_rank(rank, name, **settings):
    seen = record(name, rank=rank, kind="DDP", **settings)
    return seen.losses, seen.gradients, seen.after_three, seen.state


def check_losses_and_gradients(alone, ranks, tolerance, steps):
    """Check the first steps of the ranks' runs against those of a run on one process."""
    assert len(alone.losses) == len(alone.gradients) == STEPS
    for losses in zip(alone.losses, *(losses for losses, *_ in ranks), strict=True):
        assert sum(losses[1:]) / 2 == pytest.approx(losses[0], rel=tolerance, abs=tolerance)
    scale = max(map(largest, alone.gradients))
    for _, gradients, *_ in ranks:
        assert len(gradients) == STEPS
        for step in range(steps):
            found, expected = gradients[step], alone.gradients[step]
            assert_close(found, expected, tolerance, f"gradient of step {step}", scale=scale)


def both(name, precision):
    """Return what a run on one process recorded, and what each of two ranks returned."""
    ranks = run_processes(lambda rank: of_rank(rank, name, precision=precision), 2, init=False, timeout=PATIENCE)
    return record(name, precision=precision), ranks


@methods
@pytest.mark.matrix("DDP")
def test_ddp_equals_one_process(name):
    alone, ranks = both(name, "64-true")
    check_losses_and_gradients(alone, ranks, bound(CANCELLING, torch.float64), STEPS)
    for *_, state in ranks:
        assert_close(state, alone.state, bound(CANCELLING, torch.float64), "state at the end")


@primary
@pytest.mark.matrix("DDP")
def test_ddp_equals_one_process_in_float32(name):
    alone, ranks = both(name, "32-true")
    check_losses_and_gradients(alone, ranks, bound(NETWORK), 3)  # rounding comes back through the weights, and grows
    for *_, weights, _ in ranks:
        assert_close(weights, alone.after_three, bound(NETWORK), "weights after three steps")


CLIPPED_LARS = {"gradient_clip_val": 0.01, "make_with": {"optimizer": "lars", "lr": 2.0}}


@functools.cache
def ddp(name, lars=False):
    """Return the state of a method after a run under DDP."""
    settings = CLIPPED_LARS if lars else {"make_with": OWN_CLIPPING.get(name)}
    run = functools.partial(record, name, kind="DDP", **settings)
    return run_processes(lambda rank: run(rank=rank).state, 2, init=False, timeout=PATIENCE)[0]


def assert_moved(name, state):
    """Check that a run has moved many weights, so that two runs that agree say something."""
    module = make(name, norm=False)
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    moved = [key for key, p in trained.items() if not torch.allclose(p, state[key], rtol=0, atol=bound(NETWORK))]
    assert len(moved) > len(trained) / 4, moved


class SaveInTheMiddle(L.Callback):
    """Writes a checkpoint at the end of the first epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


class Shards(L.Callback):
    """Notes which parameters are not sharded by FSDP2."""

    def on_train_start(self, trainer, pl_module):
        self.whole = [name for name, p in pl_module.named_parameters() if not isinstance(p, DTensor)]


def whole_and_resumed(rank, name, kind, folder, sharded_checkpoint):
    """Run once without a stop and once from the middle, with other weights that have to be loaded."""
    path, shards = folder / "middle", Shards()
    settings = {"rank": rank, "kind": kind, "sharded_checkpoint": sharded_checkpoint}
    with_ = OWN_CLIPPING.get(name, {})
    seen = record(name, **settings, make_with=with_, callbacks=[SaveInTheMiddle(path), shards])
    again = record(name, **settings, make_with=with_, ckpt_path=path)
    return seen.state, again.state, seen.local_share, shards.whole


@primary
@pytest.mark.parametrize("sharded_checkpoint", [False, True], ids=["full", "sharded"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.matrix(kind)) for kind in ("FSDP1", "FSDP2")], ids=str
)
def test_sharded_equals_ddp(name, kind, sharded_checkpoint):
    expected = ddp(name)
    assert_moved(name, expected)
    with tempfile.TemporaryDirectory() as folder:
        args = name, kind, Path(folder), sharded_checkpoint
        ranks = run_processes(whole_and_resumed, 2, *args, init=False, timeout=PATIENCE)
        path = Path(folder) / "middle"
        assert path.is_dir() == sharded_checkpoint
        if not sharded_checkpoint:
            make(name, norm=False).load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    for whole, resumed, share, unsharded in ranks:
        assert_close(whole, expected, bound(NETWORK), f"{kind} and DDP")
        assert_same_bits(resumed, whole, "resumed and not stopped")
        assert share < 0.7
        assert kind == "FSDP1" or not unsharded


def of_shards(rank, name, kind):
    seen = record(name, rank=rank, kind=kind, **CLIPPED_LARS)
    return seen.state, seen.local_share


@primary
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.matrix(f"LARS, clipped, {kind}")) for kind in ("FSDP1", "FSDP2")],
    ids=str,
)
def test_lars_and_clipping_take_the_norms_of_whole_tensors(name, kind):
    expected = ddp(name, lars=True)
    assert_moved(name, expected)
    for state, share in run_processes(of_shards, 2, name, kind, init=False, timeout=PATIENCE):
        assert_close(state, expected, bound(NETWORK), f"{kind} and DDP")
        assert share < 0.7
