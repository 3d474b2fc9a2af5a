"""LoRA: official values, no drift by merging, agreement with peft, and what is refused."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_contrast.nn import LoRALinear, add_lora, build_backbone, build_masked_backbone, merge_lora
from tests.tolerances import FORMULA, NETWORK, assert_same_bits, f32

(RECORD,) = json.loads((Path(__file__).parent / "official_lora.json").read_text(encoding="utf-8"))


def official():
    x = {key: torch.tensor(value) for key, value in RECORD["inputs"].items()}
    layer = LoRALinear(6, 5, **RECORD["params"])
    layer.load_state_dict({key: value for key, value in x.items() if key != "x"})
    return layer, x["x"]


def test_equals_the_reference_implementation():
    layer, x = official()
    expected = torch.tensor(RECORD["value"])
    torch.testing.assert_close(layer(x), expected, **f32(NETWORK))
    torch.testing.assert_close(layer.eval()(x), expected, **f32(NETWORK))
    torch.testing.assert_close(layer.merged_weight(), torch.tensor(RECORD["merged_weight"]), **f32(NETWORK))
    plain = layer.merged()
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), expected, **f32(NETWORK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_changing_the_mode_does_not_drift(dtype):
    layer, x = official()
    layer, x = layer.to(dtype), x.to(dtype)
    state, output = copy.deepcopy(layer.state_dict()), layer.eval()(x)
    for _ in range(50):
        layer.train()(x)
        layer.eval()(x)
    assert_same_bits(layer.state_dict(), state, "weights")
    assert_same_bits(layer(x), output, "output")
    exact = official()[0].double()
    wide = {name: value.double() for name, value in state.items()}
    exact.load_state_dict(wide)
    assert_same_bits(
        layer.merged_weight(),
        exact.merged_weight().float().to(dtype) if dtype.itemsize < 4 else layer.merged_weight(),
        "one rounding",
    )


def test_it_starts_as_the_layer_and_trains_only_the_difference():
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 5), torch.randn(3, 2, 6)
    layer = LoRALinear.from_linear(linear, rank=2, alpha=4)
    assert_same_bits(layer(x), linear(x), "start")
    assert layer.weight.data_ptr() != linear.weight.data_ptr()
    bound = (1 / 6) ** 0.5  # of torch's own layer
    assert 0.5 * bound < float(layer.lora_A.detach().abs().max()) <= bound
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        F.mse_loss(layer(x), torch.ones(3, 2, 5)).backward()
        optimizer.step()
    assert_same_bits(layer.weight, linear.weight, "frozen")
    assert_same_bits(layer.bias, linear.bias, "frozen")
    assert float((layer(x) - linear(x)).detach().abs().max()) > 0.1
    torch.testing.assert_close(layer.eval()(x), layer.train()(x), **f32(NETWORK))
    without = LoRALinear.from_linear(nn.Linear(6, 5, bias=False).double().eval(), rank=2, alpha=4)
    assert without.bias is None
    assert without.lora_A.dtype == torch.float64
    assert not without.training


def test_dropout_is_of_the_difference_alone_and_of_training():
    layer, x = official()
    layer.dropout = 0.5
    torch.manual_seed(0)
    outputs = [layer(x) for _ in range(400)]
    assert not torch.equal(outputs[0], outputs[1])
    layer.eval()
    torch.testing.assert_close(torch.stack(outputs).mean(0), layer(x), rtol=0, atol=0.5)
    assert_same_bits(layer(x), layer(x), "eval")
    layer.lora_B.data.zero_()
    assert_same_bits(layer.train()(x), F.linear(x, layer.weight, layer.bias), "without a difference")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rank": 0}, ValueError, "`rank`"),
        ({"rank": 2.0}, TypeError, "`rank`"),
        ({"alpha": 0.0}, ValueError, "`alpha`"),
        ({"dropout": 1.0}, ValueError, "`dropout`"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        LoRALinear(6, 5, **({"rank": 2, "alpha": 4} | change))
    if "dropout" not in change:
        with pytest.raises(error, match=words):
            add_lora(nn.Sequential(nn.Linear(2, 2)), **change)


KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def small_vit(build=build_backbone):
    torch.manual_seed(0)
    return build("small_vit", backbone_kwargs=KWARGS).module


@pytest.mark.parametrize("build", [build_backbone, build_masked_backbone])
@pytest.mark.slow
def test_lora_on_a_vit(build):
    """It starts as the network, trains 2 r d numbers per layer, and merges into a network with the old names."""
    pytest.importorskip("peft")
    vit = small_vit(build)
    images, names, before = torch.randn(2, 3, 32, 32), list(vit.state_dict()), copy.deepcopy(vit.state_dict())
    expected = vit.eval()(images)
    assert add_lora(vit, rank=3, alpha=6) is vit
    assert_same_bits(vit(images), expected, "start")
    trained = {name: p for name, p in vit.named_parameters() if p.requires_grad}
    assert all(".attn." in name and "lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == 2 * (3 * (16 + 48) + 3 * (16 + 16))
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    for _ in range(2):
        vit.train()(images).square().sum().backward()
        optimizer.step()
    changed = vit.eval()(images)
    assert float((changed - expected).detach().abs().max()) > 0.01
    assert merge_lora(vit) is vit
    assert list(vit.state_dict()) == names
    torch.testing.assert_close(vit(images), changed, **f32(NETWORK * 8, size=4.0))
    same = {name for name, value in vit.state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in names if name not in same} == {
        n for n in names if "attn.qkv.weight" in n or "attn.proj.weight" in n
    }
    with pytest.raises(ValueError, match="have layers with LoRA"):
        merge_lora(vit)


def test_our_layer_is_that_of_peft():
    pytest.importorskip("peft")
    layer, x = official()
    network = nn.Sequential(nn.Linear(6, 5))
    network.load_state_dict({"0.weight": layer.weight, "0.bias": layer.bias})
    add_lora(network, rank=2, alpha=4, layers="0")
    theirs = network[0]
    theirs.lora_A["default"].weight.data.copy_(layer.lora_A.data)
    theirs.lora_B["default"].weight.data.copy_(layer.lora_B.data)
    torch.testing.assert_close(network(x), layer(x), **f32(FORMULA))


def test_a_pattern_that_fits_no_layer_names_the_layers():
    pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match=r"`layers` must match the name of a linear layer, got 'attention'.*blocks.0.attn.qkv"
    ):
        add_lora(small_vit(), layers="attention")


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning_contrast\[lora\]"):
        add_lora(small_vit())
