"""Short runs for the matrix: four steps on two batches, alone or as one of two ranks, under any strategy."""

import functools
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_contrast.callbacks import StepSeed
from tests.callbacks.step_modules import QUIET
from tests.callbacks.strategies import CPUFSDPStrategy, TakeWeights, clean, wrap_all
from tests.methods.cases import CASES, make
from tests.methods.test_contract import BATCH, as_is, rows_of, step_batch

PRIMARY = [name for name in CASES if " " not in name]
"""One case for each method; the others are variants."""
primary = pytest.mark.parametrize("name", PRIMARY)
STEPS = 4
PATIENCE = 300
"""Seconds until the processes of a test are killed; they take one to five."""


def strategy(kind, *, sharded_checkpoint=False):
    """Return a strategy for two processes; FSDP1 wraps inner layers too where it writes sharded checkpoints."""
    if kind == "FSDP1":
        policy = {"auto_wrap_policy": functools.partial(wrap_all, kinds=(nn.Sequential,))} if sharded_checkpoint else {}
        return CPUFSDPStrategy(state_dict_type="sharded" if sharded_checkpoint else "full", **policy)
    if kind == "FSDP2":
        sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        return ModelParallelStrategy(**sizes, save_distributed_checkpoint=sharded_checkpoint)
    return DDPStrategy()


def batches(name, rank=None, dtype=torch.float32):
    """Return the two batches of an epoch, or one rank's half of each; images differ more than their two views do."""
    whole = []
    for seed in (5, 6):
        views, *rest = step_batch(CASES[name], dtype, seed=seed)
        colours = torch.randn(BATCH, 3, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        whole.append([[view + 3 * colours for view in views], *rest])
    if rank is None:
        return whole
    return [rows_of(batch, slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)) for batch in whole]


class Record(TakeWeights):
    """Keeps the losses, where nothing is sharded the gradients of every step and the weights after three, and the whole
    state at the end.
    """

    def __init__(self):
        self.losses, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append(grads)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step == 3:
            self.after_three = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_end(self, trainer, pl_module):
        self.state = self.take(trainer, pl_module) | buffers(pl_module)


def buffers(module):
    """Return the buffers by name; what queues keep as the bits of numbers, as numbers."""
    kept = {clean(name): buffer.detach().clone() for name, buffer in module.named_buffers()}
    return {name: b.view(torch.float32) if name.endswith("bits") else b for name, b in kept.items()}


def run(module, loader, callbacks=(), *, ckpt_path=None, **settings):
    """Fit for two epochs and return the trainer; Lightning's advice is of no interest here."""
    kept = {"max_epochs": 2, "limit_val_batches": 0, "use_distributed_sampler": False} | QUIET
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(**(kept | settings), callbacks=[StepSeed(3), *callbacks])
        trainer.fit(module, DataLoader(loader, batch_size=None, collate_fn=as_is), ckpt_path=ckpt_path)
    return trainer


def record(name, *, rank=None, kind=None, sharded_checkpoint=False, callbacks=(), make_with=None, **settings):
    """Run a method without BatchNorm and return what was recorded.

    Args:
        name: The case.
        rank: Of two; None is one process on the joined batches.
        kind: The strategy's name in the matrix.
        sharded_checkpoint: See `strategy`.
        callbacks: Further callbacks.
        make_with: Further arguments of the method.
        **settings: Arguments of the Trainer.
    """
    seen = Record()
    if rank is not None:
        settings |= {"devices": 2, "strategy": strategy(kind, sharded_checkpoint=sharded_checkpoint)}
    dtype = torch.float64 if settings.get("precision") == "64-true" else torch.float32
    run(make(name, norm=False, **(make_with or {})), batches(name, rank, dtype), [*callbacks, seen], **settings)
    return seen


def assert_close(found, expected, tolerance, what, *, scale=None):
    """Compare two dicts of tensors and say which differs most.

    Args:
        found: Tensors by name.
        expected: The same.
        tolerance: Largest difference, as a share of ``scale``.
        what: Words for the message.
        scale: None: the largest value of each tensor, at least 1.
    """
    assert found.keys() == expected.keys(), f"{what}: {found.keys() ^ expected.keys()}"
    gaps = {"nothing": 0.0}
    for name, value in found.items():
        a, b = value.double(), expected[name].double()
        gap = (a - b).abs().max() / (scale or b.abs().max().clamp_min(1.0))
        gaps[name] = float("inf") if gap.isnan() else gap.item()
    worst = max(gaps, key=gaps.get)
    assert gaps[worst] <= tolerance, f"{what}: {worst} differs by {gaps[worst]:.2g}"


def largest(tensors):
    """Return the largest value of a dict of tensors: rounding in a gradient is a share of the terms that cancel."""
    return max(float(value.abs().max()) for value in tensors.values())
