"""A last batch of one image is refused before the epoch that would end with it."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc
from tests.callbacks.step_modules import QUIET


class Counted(lc.SimCLR):
    steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


def fit(rows, *, batch_size=4, drop_last=False, **settings):
    images = torch.rand(rows, 3, 16, 16)
    module = Counted("small_convnet", warmup_epochs=0, optimizer="sgd", lr=0.1)
    views = lc.ViewAugmentation(lc.augment.simclr_views(16))
    settings = QUIET | {"max_epochs": 1, "limit_val_batches": 0} | settings
    loader = DataLoader(TensorDataset(images), batch_size=batch_size, drop_last=drop_last, shuffle=True)
    try:
        L.Trainer(callbacks=[views], **settings).fit(module, loader)
    except ValueError as error:
        return module.steps, str(error)
    return module.steps, None


@pytest.mark.filterwarnings("ignore")
def test_it_is_refused_before_the_first_step():
    steps, error = fit(9)
    assert steps == 0
    assert error.startswith("`batch_size` must not divide 9 images with a rest of 1, got 4. Set `drop_last=True`")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"rows": 9, "drop_last": True}, 2),
        ({"rows": 10}, 3),
        ({"rows": 9, "limit_train_batches": 2}, 2),
        ({"rows": 9, "max_steps": 2}, 2),
    ],
)
def test_batches_that_are_not_reached_or_larger_are_accepted(settings, steps):
    assert fit(**settings) == (steps, None)
