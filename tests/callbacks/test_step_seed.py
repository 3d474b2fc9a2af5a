"""Every draw of a step is a function of (seed, epoch, batch, rank)."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from lightning_contrast.callbacks import StepSeed
from tests.callbacks.step_modules import fit, loader
from tests.callbacks.strategies import fit_ranks
from tests.launch import run_processes


class Draws(L.LightningModule):
    """Notes what each step draws from the three global generators, and the rows it got."""

    def __init__(self):
        super().__init__()
        self.layer, self.drawn, self.rows = nn.Linear(6, 1), {}, []

    def training_step(self, batch, batch_idx):
        draw = (random.random(), np.random.rand(), torch.rand(()).item())
        self.drawn[self.current_epoch, batch_idx] = draw
        self.rows.append(batch[0][:, 0].tolist())
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def drawn(seed, **kwargs):
    module = Draws()
    fit(module, [StepSeed(seed)], **({"max_epochs": 2} | kwargs))
    return module.drawn


def test_draws_depend_on_seed_epoch_and_batch_and_on_nothing_else():
    first = drawn(3)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    assert drawn(3) == first
    assert not set(first.values()) & set(drawn(4).values())
    assert len(first) == 16
    for generator in range(3):
        assert len({draw[generator] for draw in first.values()}) == 16


def test_a_resumed_run_draws_what_the_uninterrupted_run_draws(tmp_path):
    module = Draws()
    trainer = fit(module, [StepSeed(3)])
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    torch.manual_seed(5)
    resumed = Draws()
    fit(resumed, [StepSeed(3)], max_epochs=2, ckpt_path=tmp_path / "stop.ckpt")
    whole = drawn(3)
    assert resumed.drawn == {place: draw for place, draw in whole.items() if place[0] == 1}


def test_samplers_of_the_global_generator_still_shuffle_each_epoch():
    dataset = loader().dataset
    module = Draws()
    fit(module, [StepSeed(3)], DataLoader(dataset, batch_size=4, sampler=RandomSampler(dataset)), max_epochs=3)
    epochs = [[x for rows in module.rows[i : i + 8] for x in rows] for i in (0, 8, 16)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_it_offers_its_seed_to_the_views():
    assert StepSeed(7).provides_view_seed == StepSeed(7).seed == 7


@pytest.mark.parametrize("seed", [2**40, 2**63 - 1, 0])
def test_large_seeds_are_taken(seed):
    assert len(drawn(seed, max_epochs=1, limit_train_batches=2)) == 2


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)])
def test_bad_seeds_are_refused(seed, error):
    with pytest.raises(error, match="`seed` must be"):
        StepSeed(seed)


def ranked(rank):
    module, at_epoch_start = Draws(), []

    class Note(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            at_epoch_start.append(torch.get_rng_state())

    fit_ranks(module, [StepSeed(3), Note()], loader(8), "ddp", max_epochs=2)
    return module.drawn, at_epoch_start


@pytest.mark.dist
def test_ranks_draw_apart_in_steps_and_together_between_epochs():
    (first, starts), (second, other_starts) = run_processes(ranked, 2, init=False)
    assert not set(first.values()) & set(second.values())
    assert first == {place: draw for place, draw in drawn(3).items() if place in first}  # rank 0 draws as one process
    assert all(torch.equal(a, b) for a, b in zip(starts, other_starts, strict=True))
