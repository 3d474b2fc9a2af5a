"""Ranks draw different views, masks and noise by default, and leave the global generators equal."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.testing import run_processes
from tests.methods.cases import CASES, TinyBackbone, make
from tests.rank_runs import SETTINGS, batch_of, fit, on_ranks


class Draws(lc.SimCLR):
    """Records the views, a draw of the step, and one outside of it, as a sampler makes it."""

    def training_step(self, batch, batch_idx):
        self.views, self.noise = torch.cat(batch[0]).flatten(), torch.rand(4)
        return super().training_step(batch, batch_idx)


class Outside(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.outside = torch.rand(4)


def draws(rank, seed, world_size=2):
    if seed is not None:
        L.seed_everything(seed)
    else:
        torch.manual_seed(rank)
    module = Draws(TinyBackbone(), warmup_epochs=0, lr=0.01, optimizer="sgd", **CASES["SimCLR"].settings)
    images = torch.full((4, 3, 16, 16), 128, dtype=torch.uint8)
    images[:, :, 4:9, 3:7] = 255
    loader = DataLoader(list(zip(images, torch.arange(4), strict=True)), batch_size=4)
    callbacks = [lc.ViewAugmentation(lc.augment.simclr_views(16)), Outside()]
    ranks = on_ranks(world_size) if world_size > 1 else {}
    trainer = L.Trainer(**(SETTINGS | ranks | {"max_epochs": 1, "precision": "32-true"}), callbacks=callbacks)
    trainer.fit(module, loader)
    return module.views, module.noise, module.outside


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, None])
def test_ranks_differ_with_and_without_a_seed(seed):
    (views_a, noise_a, outside_a), (views_b, noise_b, outside_b) = run_processes(draws, 2, seed, init=False)
    assert not torch.equal(views_a, views_b)
    assert not torch.equal(noise_a, noise_b)
    assert torch.equal(outside_a, outside_b) == (seed is not None)  # samplers may rely on equal generators


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore")
def test_a_seed_gives_the_same_run_again():
    first, second = (run_processes(draws, 2, 3, init=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


class Broken(L.Callback):
    """Fails in a hook of the second step, after a draw of the step."""

    def __init__(self, hook):
        self.before = None
        setattr(self, hook, self.fail)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = [state() for state in STATES]

    def fail(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx == 1:
            random.random(), np.random.rand(), torch.rand(2)
            raise RuntimeError("in the middle of a step")


STATES = (random.getstate, lambda: np.random.get_state()[1].tolist(), lambda: torch.get_rng_state().tolist())


def states_after_an_exception(rank, hook):
    L.seed_everything(0)
    images = torch.full((8, 3, 16, 16), 0.5)
    loader = DataLoader(list(zip(zip(images, images, strict=True), torch.arange(8), strict=True)), batch_size=2)
    module, broken = make("SimCLR", norm=False), Broken(hook)
    trainer = L.Trainer(**(SETTINGS | on_ranks(2) | {"max_epochs": 1, "precision": "32-true"}), callbacks=[broken])
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        trainer.fit(module, loader)
    assert broken.before is not None
    after = [state() for state in STATES]
    return after, after[:2] == broken.before[:2]


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", ["on_before_backward", "on_before_optimizer_step", "on_train_batch_end"])
def test_an_exception_in_a_step_restores_the_generators(hook):
    (first, restored), (second, restored_too) = run_processes(states_after_an_exception, 2, hook, init=False)
    assert restored
    assert restored_too
    assert first == second


MASKED = ("MAE", "SimMIM", "Data2Vec", "VJEPA", "IJEPA", "IBOT", "DINOv2", "MSN")


class DrawsMore(L.Callback):
    """Draws numbers between the steps, as a resumed run would not have."""

    def on_train_batch_end(self, *args):
        torch.rand(5)


def masks_of_a_fit(name, seed, *others, **ranks):
    """Return what the student's passes of four steps hide or keep."""
    module, drawn = make(name), []
    tokens = module.backbone.tokens

    def recorded(images, **chosen):
        drawn.extend(value.clone() for value in chosen.values() if value is not None)
        return tokens(images, **chosen)

    module.backbone.tokens = recorded
    fit(module, [batch_of(name)] * 2, callbacks=[*others, lc.StepSeed(seed)], **ranks)
    return drawn


def same(first, second):
    """Return for each pass whether two fits drew the same."""
    return [a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_a_function_of_seed_and_step(name):
    masks = masks_of_a_fit(name, 3)
    assert all(same(masks, masks_of_a_fit(name, 3, DrawsMore())))
    assert not all(same(masks, masks_of_a_fit(name, 4)))
    half = len(masks) // 2
    assert half > 0
    assert not all(same(masks[:half], masks[half:]))  # the second epoch


def masks_on_a_rank(rank):
    return [masks_of_a_fit(name, 3, **on_ranks(2)) for name in MASKED]


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore")
def test_ranks_draw_different_masks():
    first, second = run_processes(masks_on_a_rank, 2, init=False)
    for name, a, b in zip(MASKED, first, second, strict=True):
        assert len(a) == len(b) > 0
        assert not all(same(a, b)), name
        assert all(same(a, masks_of_a_fit(name, 3))), name  # those of the first rank are the run's of one process
