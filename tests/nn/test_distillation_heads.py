"""Heads of the self-distillation family and their weight-normalized layer, against the formula and torch's own."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_contrast.nn import WeightNormLinear, build_head, ema_update
from lightning_contrast.optim import LARS, parameter_groups
from tests.tolerances import FORMULA, assert_same_bits, f32

SMALL = {"hidden_dim": 5, "bottleneck_dim": 4, "num_prototypes": 7}


def spell(mlp):
    words = {nn.GELU: "G", nn.BatchNorm1d: "B", nn.LayerNorm: "N"}
    return " ".join(
        f"L{'b' if m.bias is not None else ''}{m.out_features}" if isinstance(m, nn.Linear) else words[type(m)]
        for m in mlp.layers
    )


def test_weight_norm_equals_torchs():
    torch.manual_seed(0)
    own = WeightNormLinear(4, 6, train_scale=True).double()
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6, bias=False).double(), dim=0)
    with torch.no_grad():
        own.weight_g.uniform_(0.5, 2)
        theirs.parametrizations.weight.original0.copy_(own.weight_g)
        theirs.parametrizations.weight.original1.copy_(own.weight_v)
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(own(x), theirs(x))
    for module in (own, theirs):
        module(x).square().sum().backward()
    torch.testing.assert_close(own.weight_g.grad, theirs.parametrizations.weight.original0.grad)
    torch.testing.assert_close(own.weight_v.grad, theirs.parametrizations.weight.original1.grad)


def test_weight_norm_gives_cosines_and_freezes_its_scale():
    torch.manual_seed(0)
    layer = WeightNormLinear(4, 6)
    x = F.normalize(torch.randn(5, 4), dim=1)
    expected = F.cosine_similarity(x[:, None], layer.weight_v[None], dim=2)
    torch.testing.assert_close(layer(x), expected)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["weight_v"]
    assert layer.weight_v.abs().max() <= 0.5  # as nn.Linear(4, 6) starts


def test_weight_norm_is_an_ordinary_module():
    layer = WeightNormLinear(4, 6)
    layer(torch.randn(2, 4)).sum().backward()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
        assert other.weight_g.requires_grad is False
    teacher, start = copy.deepcopy(layer), layer.weight_v.detach().clone()
    nn.init.zeros_(layer.weight_v)
    ema_update(layer, teacher, 0.75)
    torch.testing.assert_close(teacher.weight_v.detach(), 0.75 * start)
    decayed, others = parameter_groups(layer, 0.1)
    assert [p.shape for p in decayed["params"]] == [(6, 4)]
    assert not others["params"]


def test_weight_norm_steps_with_lars():
    layer = WeightNormLinear(4, 6, train_scale=True)
    optimizer = LARS(parameter_groups(layer, 0.1), lr=0.1)
    layer(torch.randn(2, 4)).square().sum().backward()
    before = layer.weight_v.detach().clone()
    optimizer.step()
    assert torch.isfinite(layer.weight_v).all()
    assert not torch.equal(before, layer.weight_v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_norm_in_half_precision(dtype):
    torch.manual_seed(0)
    layer = WeightNormLinear(64, 8)
    with torch.no_grad():
        layer.weight_v.mul_(2e-3)  # squares of which float16 rounds to 0
    whole, half = layer.weight, copy.deepcopy(layer).to(dtype).weight
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2e-3])
def test_logits_are_computed_in_float32(dtype, scale):
    torch.manual_seed(0)
    layer, x = WeightNormLinear(64, 8), F.normalize(torch.randn(3, 64), dim=1)
    with torch.no_grad():
        layer.weight_v.mul_(scale)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(layer(x), expected)
    assert_same_bits(layer(x.to(dtype)), layer(x.to(dtype).float()))
    rounded = copy.deepcopy(layer).to(dtype)
    assert_same_bits(rounded(x.to(dtype)), rounded.float()(x.to(dtype).float()))


@pytest.mark.parametrize(("name", "call"), [("dino", lambda h, x: (h(x),)), ("ibot", lambda h, x: h(x, x))])
def test_peaked_targets_survive_autocast(name, call):
    """Logits in bfloat16 are off by up to 0.004, which changes targets at a temperature of 0.04 by up to a tenth."""
    torch.manual_seed(0)
    head = build_head(name, 16, hidden_dim=32, bottleneck_dim=32, num_prototypes=512)
    x, bottleneck = torch.randn(8, 16), []
    head.mlp.register_forward_hook(lambda _module, _inputs, out: bottleneck.append(F.normalize(out.float(), dim=1)[:8]))
    call(head, x)
    with torch.no_grad():  # prototypes close to the images
        head.last_layer.weight_v.copy_(bottleneck[0].repeat(64, 1) + 0.1 * torch.randn(512, 32))
    with torch.autocast("cpu", torch.bfloat16):
        found = call(head, x)
    expected = bottleneck[1] @ F.normalize(head.last_layer.weight_v, dim=1).T  # the MLP itself rounds
    for logits in found:
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, **f32(FORMULA))
        torch.testing.assert_close((logits / 0.04).softmax(1), (expected / 0.04).softmax(1), **f32(FORMULA, size=0.1))


def test_dino_head_is_the_references():
    torch.manual_seed(0)
    head = build_head("dino", 6, **SMALL).double()
    assert spell(head.mlp) == "Lb5 G Lb5 G Lb4"
    x = torch.randn(3, 6, dtype=torch.float64)
    first, second, third = (m for m in head.mlp.modules() if isinstance(m, nn.Linear))
    hidden = F.gelu(F.gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    out = hidden @ third.weight.T + third.bias
    prototypes = head.last_layer.weight_v / head.last_layer.weight_v.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(head(x), out / out.square().sum(1, keepdim=True).sqrt() @ prototypes.T)
    torch.testing.assert_close(head(x[None]), head(x)[None])
    assert not head.last_layer.weight_g.requires_grad
    assert build_head("dino", 6, **SMALL, norm_last_layer=False).last_layer.weight_g.requires_grad


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: build_head("dino", 6, **SMALL, norm="batch"), "Lb5 B G Lb5 B G Lb4"),
        (lambda: build_head("dino", 6, **SMALL, norm="layer"), "Lb5 N G Lb5 N G Lb4"),
        (lambda: build_head("dino", 6, **SMALL, layers=1), "Lb4"),
        (lambda: build_head("ibot", 6, **SMALL), "Lb5 G Lb5 G Lb4"),
    ],
)
def test_layers(build, expected):
    assert spell(build().mlp) == expected


def test_msn_head_is_the_references():
    head = build_head("msn", 6, hidden_dim=5, out_dim=4)
    assert spell(head) == "Lb5 B G Lb5 B G Lb4"
    assert head(torch.randn(3, 6)).shape == (3, 4)
    assert spell(build_head("msn", 6, hidden_dim=5, out_dim=4, norm=None)) == "Lb5 G Lb5 G Lb4"


def test_default_widths():
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in build_head("dino", 384).parameters() if p.ndim == 2]
        assert shapes == [(2048, 384), (2048, 2048), (256, 2048), (65536, 1), (65536, 256)]
        assert build_head("ibot", 384).last_layer.out_dim == 8192
        assert [p.shape for p in build_head("msn", 384).parameters() if p.ndim == 2][-1] == (256, 2048)


def test_start_is_the_references():
    torch.manual_seed(0)
    dino = build_head("dino", 300, hidden_dim=400, bottleneck_dim=200, num_prototypes=2)
    for head in (dino, build_head("msn", 300, hidden_dim=400, out_dim=200)):
        for linear in (m for m in head.modules() if isinstance(m, nn.Linear)):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert not linear.bias.any()


@pytest.mark.parametrize("shared", [True, False])
def test_ibot_head_gives_what_a_dino_head_gives_each(shared):
    torch.manual_seed(0)
    head = build_head("ibot", 6, **SMALL, patch_prototypes=None if shared else 9, shared=shared)
    tokens, patches = torch.randn(3, 6), torch.randn(3, 2, 6)
    token_logits, patch_logits = head(tokens, patches)
    assert patch_logits.shape == (3, 2, 7 if shared else 9)
    plain = build_head("dino", 6, **SMALL)
    plain.mlp, plain.last_layer = head.mlp, head.last_layer
    torch.testing.assert_close(token_logits, plain(tokens))
    plain.last_layer = head.last_layer if shared else head.patch_last_layer
    torch.testing.assert_close(patch_logits, plain(patches))
    token_logits, patch_logits = head(tokens, patches[:0, 0])
    assert patch_logits.shape == (0, 7 if shared else 9)
    assert token_logits.shape == (3, 7)


def test_ibot_head_trains_its_patch_layer_even_without_patches():
    head = build_head("ibot", 6, **SMALL, shared=False)
    tokens, patches = head(torch.randn(3, 6), torch.randn(0, 6))
    (tokens.sum() + patches.sum()).backward()
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)  # or DDP would wait for it


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_head("dino", 6, num_prototypes=1), "`num_prototypes` must be >= 2, got 1. A distribution"),
        (lambda: build_head("ibot", 6, patch_prototypes=1, shared=False), "`patch_prototypes` must be >= 2, got 1"),
        (
            lambda: build_head("ibot", 6, num_prototypes=4, patch_prototypes=5),
            "`patch_prototypes` must be one of None, 4",
        ),
        (lambda: build_head("dino", 6, layers=0), "`layers` must be >= 1, got 0"),
        (lambda: build_head("dino", 6, norm="group"), "`norm` must be one of 'batch', 'layer', None, got 'group'"),
        (lambda: build_head("msn", 6, hidden_dim=0), "`hidden_dim` must be >= 1, got 0"),
        (lambda: WeightNormLinear(0, 2), "`in_dim` must be >= 1, got 0"),
        (lambda: WeightNormLinear(2, 0), "`out_dim` must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
