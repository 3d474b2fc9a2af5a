"""The pooled mean and deviation of a domain."""

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_contrast.data import EmojiDataModule, estimate_mean_std
from tests.tolerances import NETWORK, ROUNDED, near, near64


class Given(L.LightningDataModule):
    """Yields what it is given."""

    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader


@pytest.mark.slow
def test_emoji_against_numpy():
    data = EmojiDataModule(batch_size=1000)  # 492 images would be left out of an epoch
    mean, std = estimate_mean_std(data)
    pixels = data.images("train").numpy().astype(np.float64) / 255
    assert mean == near64(pixels.mean((0, 2, 3)).tolist(), NETWORK, size=1)
    assert std == near64(pixels.std((0, 2, 3)).tolist(), NETWORK, size=1)
    own = pixels.std((2, 3)).mean(0)
    assert (abs(own - std) > 0.03).all()  # the mean of the images' own deviations is another number


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_uneven_batches_and_any_number_of_channels(dtype):
    images = torch.randint(0, 256, (71, 5, 3, 4), dtype=torch.uint8)
    given = images if dtype == torch.uint8 else images.float() / 255
    batches = [(part, None) for part in given.split([40, 1, 30])]
    mean, std = estimate_mean_std(Given(batches))
    pixels = images.double().numpy() / 255
    assert mean == near(pixels.mean((0, 2, 3)).tolist(), ROUNDED, size=1)
    assert std == near(pixels.std((0, 2, 3)).tolist(), ROUNDED, size=1)


def test_a_constant_channel_has_no_negative_variance():
    images = torch.full((50, 2, 3, 3), 0.1)
    images[:, 1] = torch.rand(50, 3, 3)
    _, std = estimate_mean_std(Given([images]))
    assert std[0] == near64(0, NETWORK, size=1)


def test_a_shuffled_loader_is_read_whole_and_draws_nothing():
    images = torch.rand(10, 1, 2, 2)
    loader = DataLoader([(image, 0) for image in images], batch_size=4, shuffle=True, drop_last=True)
    state = torch.get_rng_state()
    mean, _ = estimate_mean_std(Given(loader))
    assert torch.equal(state, torch.get_rng_state())
    assert mean[0] == near(images.double().mean().item(), ROUNDED, size=1)


def test_an_iterable_set_is_taken_as_it_comes():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.tensor([0.0, 0.5, 1.0])[:, None, None, None])

    mean, std = estimate_mean_std(Given(DataLoader(Stream(), batch_size=2)))
    assert mean == pytest.approx((0.5,))
    assert std == pytest.approx(((1 / 6) ** 0.5,))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "yield at least one training image"),
        ([torch.full((2, 3, 4, 4), 2.0)], ValueError, r"yield floats in 0\.\.1, got \(2\.0, 2\.0\)"),
        ([torch.full((2, 3, 4, 4), float("nan"))], ValueError, r"yield floats in 0\.\.1"),
        ([torch.zeros(2, 3, 4, 4, dtype=torch.int64)], TypeError, "yield uint8 or float images, got torch.int64"),
        ([[torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)]], TypeError, "yield images, got 'views'"),
    ],
)
def test_bad_data(batches, error, message):
    with pytest.raises(error, match=message):
        estimate_mean_std(Given(batches))
