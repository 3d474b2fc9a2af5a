"""Two nodes with a process each, on this machine: the environments of torchrun and SLURM, and torchrun itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

import lightning_contrast as lc
from lightning_contrast.testing import free_port, run_processes
from tests.methods.cases import CASES, make
from tests.methods.test_contract import Data, trainer
from tests.rank_runs import batch_of, fitted_state, shares
from tests.tolerances import CANCELLING, f64

pytestmark = pytest.mark.dist


def torchrun_environment(node, port):
    """What ``torchrun --nnodes=2 --nproc_per_node=1`` sets for its process."""
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "RANK": str(node),
        "GROUP_RANK": str(node),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }


def slurm_environment(node, port):
    """What ``srun`` sets under ``--nodes=2 --ntasks-per-node=1``."""
    return {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NAME": "pretrain",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_PROCID": str(node),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": "0",
        "MASTER_PORT": str(port),
    }


LAUNCHERS = {
    "torchrun": (torchrun_environment, TorchElasticEnvironment),
    "slurm": (slurm_environment, SLURMEnvironment),
}


class Where(Callback):
    """Notes how the Trainer counts its processes."""

    def on_train_start(self, trainer, pl_module):
        strategy = trainer.strategy
        self.environment = type(strategy.cluster_environment)
        self.place = (trainer.num_nodes, trainer.world_size, trainer.global_rank, trainer.node_rank, trainer.local_rank)


def on_node(node, launcher, port, work):
    """Do ``work`` as the only process of a node."""
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):  # of the test's own launcher
        del os.environ[name]
    os.environ.update(LAUNCHERS[launcher][0](node, port))
    return work(node)


TWO_NODES = {"devices": 1, "num_nodes": 2, "strategy": "ddp"}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_nodes_equal_one_process(launcher):
    """MoCo has a queue and a momentum network, SwAV queues and Sinkhorn's assignments over all ranks."""
    names = ("MoCo", "SwAV")
    alone = {name: fitted_state(make(name, norm=False), [batch_of(name)] * 2) for name in names}

    def work(node):
        found = {}
        for name in names:
            share, where = batch_of(name, shares([4, 4])[node]), Where()
            state = fitted_state(make(name, norm=False), [share] * 2, callbacks=[where], **TWO_NODES)
            found[name] = state, where.environment, where.place
        return found

    for node, found in enumerate(run_processes(on_node, 2, launcher, free_port(), work, init=False, timeout=300)):
        for name, (state, environment, place) in found.items():
            assert environment is LAUNCHERS[launcher][1]
            assert place == (2, 2, node, node, 0)
            for key, value in state.items():
                torch.testing.assert_close(value, alone[name][key], **f64(CANCELLING))


class Draws(Callback):
    """Notes the images and the random numbers of each step."""

    def __init__(self):
        self.indices, self.numbers = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.indices += batch[2].tolist()
        self.numbers.append((torch.rand(()).item(), batch[0][0].double().sum().item()))


def test_nodes_see_different_images_views_and_random_numbers():
    """Shares and seeds follow the rank among all processes; each process is number 0 of its node."""

    def work(node):
        draws = Draws()
        run = trainer(None, CASES["SimCLR"], epochs=1, callbacks=[draws], limit_val_batches=0, **TWO_NODES)
        run.fit(make("SimCLR", norm=False), Data(4, indices=True))
        return draws.indices, draws.numbers

    (first, drawn), (second, others) = run_processes(on_node, 2, "torchrun", free_port(), work, init=False, timeout=300)
    assert len(first) == len(second) == 16
    assert not set(first) & set(second)
    assert not {number for pair in drawn for number in pair} & {number for pair in others for number in pair}


PROGRAM = """
import os
import sys

import torch

from tests.methods.cases import make
from tests.rank_runs import batch_of, fitted_state, shares

node = int(os.environ["GROUP_RANK"])
share = batch_of("MoCo", shares([4, 4])[node])
state = fitted_state(make("MoCo", norm=False), [share] * 2, devices=1, num_nodes=2, strategy="ddp")
torch.save(state, f"{sys.argv[1]}/node{node}.pt")
"""


@pytest.mark.slow
def test_torchrun_starts_two_nodes(tmp_path):
    program, port = tmp_path / "program.py", free_port()
    program.write_text(PROGRAM)
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", "--local_addr=127.0.0.1"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node_rank={node}", str(program), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        for node in nodes:
            output, _ = node.communicate(timeout=500)
            assert node.returncode == 0, output
    finally:
        for node in nodes:
            node.kill()  # no effect on those that have ended
            node.communicate()
    alone = fitted_state(make("MoCo", norm=False), [batch_of("MoCo")] * 2)
    for node in range(2):
        state = torch.load(tmp_path / f"node{node}.pt", weights_only=True)
        for key, value in state.items():
            torch.testing.assert_close(value, alone[key], **f64(CANCELLING))


def test_the_learning_rate_follows_the_images_of_all_nodes():
    """4 images on each of 2 nodes give the rate of 8 on one process."""

    def rate(**kwargs):
        module = make("SimCLR", norm=False, lr=None)
        run = trainer(None, CASES["SimCLR"], epochs=1, limit_val_batches=0, limit_train_batches=1, **kwargs)
        run.fit(module, Data(4 if kwargs else 8))
        return run.optimizers[0].param_groups[0]["initial_lr"]

    def work(node):
        return rate(**TWO_NODES)

    alone = rate()
    assert run_processes(on_node, 2, "torchrun", free_port(), work, init=False, timeout=300) == [alone, alone]
    assert alone == lc.optim.scaled_lr(lc.SimCLR.base_lr, 8, rule=lc.SimCLR.lr_rule)
