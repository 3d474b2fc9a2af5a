"""Heads layer by layer, as the authors' programs have them."""

import pytest
import torch
from torch import nn

from lightning_contrast import nn as lcnn

# L: linear, Lb: with bias, Lf: with a frozen bias; B: normalisation, Bs: scale only, B-: no affine; R: ReLU.
HEADS = {
    "simclr v1": (lambda **k: lcnn.simclr_head(6, out_dim=4, **k), "L6 B R L4 Bs"),
    "simclr v2": (lambda **k: lcnn.simclr_head(6, 5, 4, layers=3, **k), "L5 B R L5 B R L4 Bs"),
    "moco v1": (lambda **k: lcnn.moco_head(6, out_dim=4, layers=1, **k), "Lb4"),
    "moco v2": (lambda **k: lcnn.moco_head(6, out_dim=4, **k), "Lb6 R Lb4"),
    "moco v3 resnet": (lambda **k: lcnn.moco_v3_projector(6, 5, 4, **k), "L5 B R L4 B-"),
    "moco v3 vit": (lambda **k: lcnn.moco_v3_projector(6, 5, 4, layers=3, **k), "L5 B R L5 B R L4 B-"),
    "moco v3 predictor": (lambda **k: lcnn.moco_v3_predictor(6, 5, 4, **k), "L5 B R L4"),
    "moco v3 vit predictor": (lambda **k: lcnn.moco_v3_predictor(6, 5, 4, last_norm=True, **k), "L5 B R L4 B-"),
    "byol": (lambda **k: lcnn.byol_mlp(6, 5, 4, **k), "Lb5 B R L4"),
    "simsiam": (lambda **k: lcnn.simsiam_projector(6, out_dim=4, **k), "L6 B R L6 B R Lf4 B-"),
    "simsiam cifar": (lambda **k: lcnn.simsiam_projector(6, 5, 4, layers=2, **k), "L5 B R Lf4 B-"),
    "simsiam predictor": (lambda **k: lcnn.simsiam_predictor(6, 2, **k), "L2 B R Lb6"),
    "barlow": (lambda **k: lcnn.barlow_projector(6, 5, 4, **k), "L5 B R L5 B R L4"),
    "vicreg": (lambda **k: lcnn.vicreg_expander(6, 5, 4, **k), "Lb5 B R Lb5 B R L4"),
    "supcon": (lambda **k: lcnn.supcon_head(6, out_dim=4, **k), "Lb6 R Lb4"),
    "spectral": (lambda **k: lcnn.spectral_head(6, 5, 4, **k), "L5 B R L4 B"),
    "nnclr": (lambda **k: lcnn.nnclr_projector(6, 5, 4, **k), "L5 B R L5 B R L4 B"),
    "nnclr predictor": (lambda **k: lcnn.nnclr_predictor(6, 5, 4, **k), "L5 B R Lb4"),
    "debiased": (lambda **k: lcnn.debiased_head(6, 5, 4, **k), "L5 B R Lb4"),
}
DEFAULTS = {
    lcnn.simclr_head: [512, 128],
    lcnn.moco_head: [512, 128],
    lcnn.moco_v3_projector: [4096, 256],
    lcnn.byol_mlp: [4096, 256],
    lcnn.simsiam_projector: [512, 512, 2048],
    lcnn.barlow_projector: [8192, 8192, 8192],
    lcnn.vicreg_expander: [8192, 8192, 8192],
    lcnn.supcon_head: [512, 128],
    lcnn.spectral_head: [2048, 1000],
    lcnn.nnclr_projector: [2048, 2048, 256],
    lcnn.debiased_head: [512, 128],
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


@pytest.mark.parametrize("build", DEFAULTS, ids=lambda build: build.__name__)
def test_default_widths(build):
    with torch.device("meta"):
        head = build(512)
    assert [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)] == DEFAULTS[build]


def test_default_predictors():
    with torch.device("meta"):
        predictors = lcnn.moco_v3_predictor(), lcnn.nnclr_predictor(), lcnn.simsiam_predictor()
    shapes = [[m.weight.shape for m in p.modules() if isinstance(m, nn.Linear)] for p in predictors]
    assert shapes == [[(4096, 256), (256, 4096)], [(4096, 256), (256, 4096)], [(512, 2048), (2048, 512)]]


def test_simclr_head_starts_small():
    torch.manual_seed(0)
    for norm in ("batch", None):
        linears = [m for m in lcnn.simclr_head(300, norm=norm).modules() if isinstance(m, nn.Linear)]
        for linear in linears:
            assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
            assert abs(linear.weight.mean().item()) < 1e-3
            assert linear.bias is None or not linear.bias.any()


def test_byol_mlp_starts_as_haiku_does():
    torch.manual_seed(0)
    first, last = (m for m in lcnn.byol_mlp(400, 900, 100).modules() if isinstance(m, nn.Linear))
    for linear in (first, last):
        deviation = linear.in_features**-0.5
        assert linear.weight.abs().max() <= 2 * deviation
        assert linear.weight.std().item() == pytest.approx(0.8796 * deviation, rel=0.02)  # of a normal cut at 2
    assert not first.bias.any()


def test_scale_without_offset():
    torch.manual_seed(0)
    norm = lcnn.simclr_head(6, out_dim=4).layers[-1]
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
    head = nn.SyncBatchNorm.convert_sync_batchnorm(lcnn.simclr_head(6, out_dim=4))
    assert isinstance(head.layers[-1], nn.SyncBatchNorm)
    assert head.layers[-1].bias is None
    assert set(lcnn.simclr_head(6, out_dim=4).state_dict()) == set(head.state_dict())


def test_hidden_layers_share_their_parameters():
    head = lcnn.simclr_head(6, 5, 4, layers=3).eval()
    x = torch.randn(3, 6)
    tap = lcnn.hidden_layers(head, 1)
    assert tap[0] is head.layers[0]
    expected = (x @ head.layers[0].weight.T / (1 + 1e-5) ** 0.5).relu()
    torch.testing.assert_close(tap(x), expected)
    assert torch.equal(lcnn.hidden_layers(head, 0)(x), x)
    assert len(lcnn.hidden_layers(head, 2)) == 6
    with pytest.raises(ValueError, match="`count` must be one of 0, 1, 2, got 3"):
        lcnn.hidden_layers(head, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lcnn.simclr_head(6, norm="group"), "`norm` must be one of 'batch', 'layer', None, got 'group'"),
        (lambda: lcnn.simclr_head(6, layers=0), "`layers` must be >= 1, got 0"),
        (lambda: lcnn.byol_mlp(6, 0), "`dims` must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
