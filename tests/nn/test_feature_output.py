"""What networks return becomes features, or an error that says how to make it so."""

import copy
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc
from lightning_contrast.export import export, load_backbone
from lightning_contrast.nn import build_backbone
from tests.callbacks.step_modules import QUIET

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MAP = IMAGES.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)).repeat(1, 2, 1, 1)  # (4, 6, 4, 4)
TOKENS = MAP.flatten(2).mT  # (4, 16, 6)


class Returns(nn.Module):
    """Returns what it is given, and has a weight."""

    num_features = 6

    def __init__(self, output, **attributes):
        super().__init__()
        self.weight, self.output = nn.Parameter(torch.ones(())), output
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, images):
        return self.output


def features(output, tokens=None, **attributes):
    return build_backbone(Returns(output, **attributes), tokens=tokens).module(IMAGES)


def hugging_face(**fields):
    return SimpleNamespace(**{"pooler_output": None} | fields)


MEAN = MAP.mean((2, 3))
CASES = {
    "features": (MEAN, {}, MEAN),
    "map": (MAP, {}, MEAN),
    "map with the channels last": (MAP.permute(0, 2, 3, 1), {}, MEAN),
    "volume": (MAP.unsqueeze(2), {}, MEAN),
    "series": (MAP.flatten(2), {}, MEAN),
    "tokens": (TOKENS, {"tokens": "mean"}, MEAN),
    "class token": (TOKENS, {"tokens": "cls"}, TOKENS[:, 0]),
    "tokens behind two others": (
        torch.cat([TOKENS[:, :2] + 9, TOKENS], 1),
        {"tokens": "mean", "num_prefix_tokens": 2},
        MEAN,
    ),
    "pooled of Transformers": (hugging_face(last_hidden_state=TOKENS, pooler_output=MEAN + 1), {}, MEAN + 1),
    "pooled map of Transformers": (
        hugging_face(last_hidden_state=MAP, pooler_output=(MEAN + 1)[..., None, None]),
        {},
        MEAN + 1,
    ),
    "map of Transformers": (hugging_face(last_hidden_state=MAP), {}, MEAN),
    "tokens of Transformers": (
        hugging_face(last_hidden_state=TOKENS, pooler_output=MEAN + 1),
        {"tokens": "mean"},
        MEAN,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_pooled(case):
    output, arguments, expected = CASES[case]
    torch.testing.assert_close(features(output, **arguments), expected)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (TOKENS, r"got '\(4, 16, 6\) from Returns'. Set `tokens=\"mean\"` or `tokens=\"cls\"`"),
        (hugging_face(last_hidden_state=TOKENS), r"got .* Set `tokens=\"mean\"`"),
        ((MEAN, MAP), "got 'tuple from Returns'. Wrap it in a module that returns one tensor"),
        ([MAP], "got 'list from Returns'"),
        (MEAN[:, :5], r"got '\(4, 5\) from Returns'. Set `feature_dim=5`"),
        (MAP[:, :5], r"got '\(4, 5, 4, 4\) from Returns'. Set `feature_dim`"),
        (MEAN[:, 0], r"got '\(4,\) from Returns'"),
    ],
)
def test_anything_else_is_refused_and_says_how_to_fix_it(output, message):
    with pytest.raises(ValueError, match=r"`backbone` must return features \(B, 6\), " + message):
        features(output)


def test_a_classifier_is_named_at_the_first_step():
    model = lc.SimCLR(torchvision.models.resnet18(), feature_dim=512)
    with pytest.raises(ValueError, match=r"`backbone` must return .* It has its classifier `fc`: set `backbone.fc ="):
        model(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("config", [{"hidden_size": 6}, {"hidden_sizes": [3, 6]}])
def test_the_width_of_a_network_of_transformers_is_read(config):
    network = Returns(MEAN, config=SimpleNamespace(**config))
    network.num_features = None
    assert build_backbone(network).feature_dim == 6


@pytest.mark.slow
def test_a_map_trains_is_copied_for_the_teacher_and_is_exported(tmp_path):
    def network():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        net.num_features = 6
        return net

    model = lc.BYOL(network(), hidden_dim=8, projection_dim=4, warmup_epochs=0, optimizer="sgd", lr=0.1)
    views = lc.ViewAugmentation(lc.augment.simclr_views(16))
    trainer = L.Trainer(callbacks=[views], **(QUIET | {"max_steps": 2, "max_epochs": 1, "limit_val_batches": 0}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, DataLoader(TensorDataset(IMAGES.repeat(4, 1, 1, 1)), batch_size=8))
    assert trainer.global_step == 2
    model.eval()
    plain = copy.deepcopy(model.backbone)
    plain._forward_hooks.clear()
    torch.testing.assert_close(model(IMAGES), plain(IMAGES).mean((2, 3)))
    assert model.momentum_backbone(IMAGES).shape == (4, 6)
    spec = {"size": 16, "mean": None, "std": None}
    again = load_backbone(export(model, tmp_path / "net.pt", input_spec=spec), network())
    torch.testing.assert_close(again(IMAGES), model(IMAGES))
    export(model, tmp_path / "net.onnx", format="onnx", input_spec=spec)  # compares the graph's features


def test_the_pooling_of_tokens_is_exported(tmp_path):
    settings = {"img_size": 16, "patch_size": 8, "depth": 1, "global_pool": ""}
    model = lc.SimCLR("test_vit", backbone_kwargs=settings, tokens="cls")
    path = export(model, tmp_path / "vit.pt", input_spec={"size": 16, "mean": None, "std": None})
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(path)(IMAGES), model.eval()(IMAGES))
