"""Layer-wise learning rates, against the rule of DINOv2's reference implementation and against timm's."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay

from lightning_contrast.nn import MaskedViT
from lightning_contrast.optim.layer_decay import layer_rates, split_by_rate

DEPTH, DECAY, PATCH = 3, 0.9, 0.2


def vit():
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": DEPTH, "num_heads": 2, "mlp_ratio": 1.0}
    return VisionTransformer(num_classes=0, reg_tokens=2, init_values=1e-5, **sizes)


def reference_rate(name):
    """``get_vit_lr_decay_rate`` of dinov2/utils/param_groups.py, times the multiplier of the patch embedding."""
    name = f"backbone.{name}"
    layer_id = DEPTH + 1
    if any(part in name for part in (".pos_embed", ".patch_embed", ".mask_token", ".cls_token", ".reg_token")):
        layer_id = 0
    elif ".blocks." in name:
        layer_id = int(name[name.find(".blocks.") :].split(".")[2]) + 1
    return DECAY ** (DEPTH + 1 - layer_id) * (PATCH if "patch_embed" in name else 1.0)


@pytest.mark.parametrize("wrapped", [False, True])
def test_rates_are_those_of_the_reference(wrapped):
    network = MaskedViT(vit()) if wrapped else vit()
    rates = layer_rates(network, DECAY, PATCH)
    for name, parameter in network.named_parameters():
        assert rates.get(parameter, 1.0) == pytest.approx(reference_rate(name.removeprefix("masked.vit."))), name
    assert len({round(rate, 9) for rate in rates.values()}) == DEPTH + 2


@pytest.mark.slow
def test_wrapped_blocks_keep_their_rates():
    """FSDP1 and torch.compile insert a part into the names of what they wrap."""
    plain, compiled = vit(), vit()
    compiled.blocks = torch.compile(compiled.blocks)
    rates = [layer_rates(network, DECAY, PATCH) for network in (plain, compiled)]
    names = [name for name, _ in compiled.named_parameters()]
    assert any("blocks._orig_mod.0." in name for name in names)
    for ours, theirs, name in zip(plain.parameters(), compiled.parameters(), names, strict=True):
        assert rates[0].get(ours, 1.0) == rates[1].get(theirs, 1.0), name


def test_timm_has_other_rates():
    """Why timm's function is not used: every rate below the last norm is one power of the decay higher."""
    network = vit()
    theirs = {p: g["lr_scale"] for g in param_groups_layer_decay(network, layer_decay=DECAY) for p in g["params"]}
    ours = layer_rates(network, DECAY, 1.0)
    for name, parameter in network.named_parameters():
        is_norm = name.startswith("norm.")
        assert theirs[parameter] * (1 if is_norm else DECAY) == pytest.approx(ours.get(parameter, 1.0)), name


def test_groups_are_split_and_keep_their_settings():
    network = vit()
    parameters = list(network.parameters())
    groups = [{"params": parameters[:5], "weight_decay": 0.1}, {"params": parameters[5:], "weight_decay": 0.0}]
    split = split_by_rate(groups, network, DECAY, PATCH)
    rates = layer_rates(network, DECAY, PATCH)
    assert sorted(map(id, parameters)) == sorted(id(p) for group in split for p in group["params"])
    for group in split:
        assert {rates.get(p, 1.0) for p in group["params"]} <= {group["lr_multiplier"]}
        first = {id(p) for p in parameters[:5]}
        assert {id(p) in first for p in group["params"]} <= {group["weight_decay"] == 0.1}
