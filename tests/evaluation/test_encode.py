"""Features of frozen networks: of tensors and of loaders, in eval mode."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast.evaluation import encode

IMAGES = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(), nn.Flatten())


def by_hand(images):
    model = network().eval()
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize(
    "images",
    [IMAGES, DataLoader(TensorDataset(IMAGES, LABELS), 4), [IMAGES[:4], {"image": IMAGES[4:], "label": LABELS[4:]}]],
    ids=["tensor", "loader", "list of batches"],
)
def test_features_are_those_of_eval_mode_in_order(images):
    model = network()
    model[1].eval()
    assert torch.equal(encode(model, images, batch_size=4), by_hand(IMAGES))
    assert [module.training for module in model] == [True, False, True, True]
    assert torch.equal(encode(model, images, lambda batch: batch / 2, batch_size=4), by_hand(IMAGES / 2))
    assert torch.equal(model[1].running_mean, torch.zeros(5))


def test_what_cannot_be_encoded_is_named():
    with pytest.raises(TypeError, match="`images` must be a tensor or a loader, got 'int'"):
        encode(network(), 3)
    with pytest.raises(ValueError, match="`images` must be one tensor per batch, got '2 views'"):
        encode(network(), [([IMAGES, IMAGES], LABELS)])
    with pytest.raises(ValueError, match="`images` must hold at least one image"):
        encode(network(), [])
    with pytest.raises(TypeError, match="`batch` must"):
        encode(network(), ["paths"])
