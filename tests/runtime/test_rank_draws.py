"""Ranks draw different views, masks and noise by default, and leave the global generators equal."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.testing import run_processes
from tests.methods.cases import CASES, TinyBackbone
from tests.rank_runs import SETTINGS, on_ranks


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
