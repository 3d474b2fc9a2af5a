"""Heads layer by layer, as in the reference implementations."""

import pytest
import torch
from torch import nn

from lightning_contrast import nn as lcnn
from lightning_contrast.nn import build_head

SMALL = {"hidden_dim": 5, "out_dim": 4}
# L: linear, Lb: with bias, Lf: with a frozen bias; B: normalization, Bs: scale only, B-: no affine; R: ReLU.
HEADS = {
    "simclr v1": (lambda **k: build_head("simclr", 6, out_dim=4, **k), "L6 B R L4 Bs"),
    "simclr v2": (lambda **k: build_head("simclr", 6, **SMALL, layers=3, **k), "L5 B R L5 B R L4 Bs"),
    "moco v1": (lambda **k: build_head("moco", 6, out_dim=4, layers=1, **k), "Lb4"),
    "moco v2": (lambda **k: build_head("moco", 6, out_dim=4, **k), "Lb6 R Lb4"),
    "moco v3 resnet": (lambda **k: build_head("moco_v3_projector", 6, **SMALL, **k), "L5 B R L4 B-"),
    "moco v3 vit": (lambda **k: build_head("moco_v3_projector", 6, **SMALL, layers=3, **k), "L5 B R L5 B R L4 B-"),
    "moco v3 predictor": (lambda **k: build_head("moco_v3_predictor", 6, **SMALL, **k), "L5 B R L4"),
    "moco v3 vit predictor": (
        lambda **k: build_head("moco_v3_predictor", 6, **SMALL, last_norm="plain", **k),
        "L5 B R L4 B-",
    ),
    "byol": (lambda **k: build_head("byol", 6, **SMALL, **k), "Lb5 B R L4"),
    "simsiam": (lambda **k: build_head("simsiam_projector", 6, out_dim=4, **k), "L6 B R L6 B R Lf4 B-"),
    "simsiam cifar": (lambda **k: build_head("simsiam_projector", 6, **SMALL, layers=2, **k), "L5 B R Lf4 B-"),
    "simsiam predictor": (lambda **k: build_head("simsiam_predictor", 6, hidden_dim=2, **k), "L2 B R Lb6"),
    "barlow": (lambda **k: build_head("barlow_twins", 6, **SMALL, **k), "L5 B R L5 B R L4"),
    "vicreg": (lambda **k: build_head("vicreg", 6, **SMALL, **k), "Lb5 B R Lb5 B R L4"),
    "lejepa": (lambda **k: build_head("lejepa", 6, **SMALL, **k), "Lb5 B R Lb5 B R Lb4"),
    "tico": (lambda **k: build_head("tico", 6, **SMALL, **k), "L5 B R Lb4"),
    "w_mse": (lambda **k: build_head("w_mse", 6, **SMALL, **k), "Lb5 B R Lb4"),
    "mmcr": (lambda **k: build_head("mmcr", 6, **SMALL, **k), "L5 B R L5 B R L4"),
    "vicregl maps": (lambda **k: build_head("vicregl_maps", 6, **SMALL, **k), "Lb5 B R Lb5 B R L4"),
    "simreg": (lambda **k: build_head("simreg", 6, **SMALL, **k), "Lb5 B R Lb4"),
    "supcon": (lambda **k: build_head("supcon", 6, out_dim=4, **k), "Lb6 R Lb4"),
    "spectral": (lambda **k: build_head("spectral", 6, **SMALL, **k), "L5 B R L4 B"),
    "nnclr": (lambda **k: build_head("nnclr_projector", 6, **SMALL, **k), "L5 B R L5 B R L4 B"),
    "tclr": (lambda **k: build_head("tclr", 6, out_dim=4, **k), "Lb6 B R L4 B"),
    "cvrl": (lambda **k: build_head("cvrl", 6, **SMALL, **k), "L5 B R L5 B R L5 B R Lb4"),
    "nnclr predictor": (lambda **k: build_head("nnclr_predictor", 6, **SMALL, **k), "L5 B R Lb4"),
}
DEFAULTS = {
    "simclr": [512, 128],
    "moco": [512, 128],
    "moco_v3_projector": [4096, 256],
    "byol": [4096, 256],
    "simsiam_projector": [512, 512, 2048],
    "barlow_twins": [8192, 8192, 8192],
    "vicreg": [8192, 8192, 8192],
    "lejepa": [2048, 2048, 512],
    "visreg": [2048, 2048, 256],
    "tico": [4096, 256],
    "w_mse": [1024, 64],
    "mmcr": [8192, 8192, 512],
    "vicregl_maps": [512, 512, 512],
    "data2vec": [512],
    "simreg": [512, 512],
    "supcon": [512, 128],
    "spectral": [2048, 1000],
    "nnclr_projector": [2048, 2048, 256],
    "swav": [2048, 128],
    "tclr": [512, 128],
    "cvrl": [2048, 2048, 2048, 128],
    "msn": [2048, 2048, 256],
}


def spell(head):
    words = []
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            bias = "" if layer.bias is None else "b" if layer.bias.requires_grad else "f"
            words.append(f"L{bias}{layer.out_features}")
        elif isinstance(layer, nn.ReLU):
            words.append("R")
        else:
            assert isinstance(layer, nn.BatchNorm1d | nn.LayerNorm)
            words.append("B" + ("-" if layer.weight is None else "s" if layer.bias is None else ""))
    return " ".join(words)


@pytest.mark.parametrize("name", HEADS)
def test_layers(name):
    build, expected = HEADS[name]
    head = build()
    assert spell(head) == expected
    assert head(torch.randn(8, 6)).shape[1] == int(expected.replace(" B-", "").replace(" Bs", "").replace(" B", "")[-1])


@pytest.mark.parametrize("name", HEADS)
def test_layer_norm_has_the_same_form(name):
    build, expected = HEADS[name]
    head = build(norm="layer")
    assert not any(isinstance(module, nn.BatchNorm1d) for module in head.modules())
    if "B" in expected:
        assert spell(head) == expected


@pytest.mark.parametrize("name", HEADS)
def test_without_norm_the_biases_come_back(name):
    build, expected = HEADS[name]
    head = build(norm=None)
    words = expected.split()
    wanted = [
        word.replace("L", "Lb") if "b" not in word and i + 1 < len(words) and words[i + 1][0] == "B" else word
        for i, word in enumerate(word.replace("Lf", "L") for word in words)
    ]
    assert spell(head) == " ".join(word for word in wanted if word[0] != "B")
    head(torch.randn(1, 6))  # works on a batch of one


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_widths(name):
    with torch.device("meta"):
        head = build_head(name, 512)
    assert [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)] == DEFAULTS[name]


def test_every_head_of_the_table_has_its_widths_tested():
    predictors = {"moco_v3_predictor", "nnclr_predictor", "simsiam_predictor"}
    assert set(lcnn.HEADS) == set(DEFAULTS) | predictors | {"dino", "ibot"}


@pytest.mark.parametrize("name", lcnn.HEADS)
def test_unknown_options_are_refused(name):
    with pytest.raises(TypeError, match=r"`options` must be one of 'hidden_dim', .*, got 'hidden'"):
        build_head(name, 8, hidden=4)
    other = "out_dim" if name in ("dino", "ibot") else "num_prototypes"
    with pytest.raises(TypeError, match=f"for the head '{name}', got '{other}'"):
        build_head(name, 8, **{other: 4})
    for internal in ("init", "last_bias"):  # part of what the name stands for
        with pytest.raises(TypeError, match=f"got '{internal}'"):
            build_head(name, 8, **{internal: None})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"`name` must be one of 'simclr', .*, got 'simclr_v2'"):
        build_head("simclr_v2", 8)


def test_default_predictors():
    with torch.device("meta"):
        widths = {"moco_v3_predictor": 256, "nnclr_predictor": 256, "simsiam_predictor": 2048}
        predictors = [build_head(name, width) for name, width in widths.items()]
    shapes = [[m.weight.shape for m in p.modules() if isinstance(m, nn.Linear)] for p in predictors]
    assert shapes == [[(4096, 256), (256, 4096)], [(4096, 256), (256, 4096)], [(512, 2048), (2048, 512)]]


def test_simclr_head_starts_small():
    torch.manual_seed(0)
    for norm in ("batch", None):
        linears = [m for m in build_head("simclr", 300, norm=norm).modules() if isinstance(m, nn.Linear)]
        for linear in linears:
            assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
            assert abs(linear.weight.mean().item()) < 1e-3
            assert linear.bias is None or not linear.bias.any()


def test_byol_mlp_starts_as_haiku_does():
    torch.manual_seed(0)
    head = build_head("byol", 400, hidden_dim=900, out_dim=100)
    first, last = (m for m in head.modules() if isinstance(m, nn.Linear))
    for linear in (first, last):
        deviation = linear.in_features**-0.5
        assert linear.weight.abs().max() <= 2 * deviation
        assert linear.weight.std().item() == pytest.approx(0.8796 * deviation, rel=0.02)  # of a normal cut at 2
    assert not first.bias.any()


def test_scale_without_offset():
    torch.manual_seed(0)
    norm = build_head("simclr", 6, out_dim=4).layers[-1]
    x = torch.randn(32, 4, dtype=torch.float64)
    norm.double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    expected = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert not norm.running_mean.any()


def test_heads_convert_to_sync_batchnorm():
    head = nn.SyncBatchNorm.convert_sync_batchnorm(build_head("simclr", 6, out_dim=4))
    assert isinstance(head.layers[-1], nn.SyncBatchNorm)
    assert head.layers[-1].bias is None
    assert set(build_head("simclr", 6, out_dim=4).state_dict()) == set(head.state_dict())


def test_hidden_layers_share_their_parameters():
    head = build_head("simclr", 6, **SMALL, layers=3).eval()
    x = torch.randn(3, 6)
    first = lcnn.hidden_layers(head, 1)
    assert first[0] is head.layers[0]
    expected = (x @ head.layers[0].weight.T / (1 + 1e-5) ** 0.5).relu()
    torch.testing.assert_close(first(x), expected)
    assert torch.equal(lcnn.hidden_layers(head, 0)(x), x)
    assert len(lcnn.hidden_layers(head, 2)) == 6
    with pytest.raises(ValueError, match="`count` must be one of 0, 1, 2, got 3"):
        lcnn.hidden_layers(head, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_head("simclr", 6, norm="group"), "`norm` must be one of 'batch', 'layer', None, got 'group'"),
        (lambda: build_head("simclr", 6, layers=0), "`layers` must be >= 1, got 0"),
        (lambda: build_head("byol", 6, hidden_dim=0), "`hidden_dim` must be >= 1, got 0"),
        (lambda: build_head("byol", 6, out_dim=0), "`projection_dim` must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
