"""Masked vision transformers against a plain one, and which backbones are refused."""

import copy

import pytest
import timm
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.nn import MaskedViT, build_backbone, build_masked_backbone, select_patches
from tests.plain_transformer import plain_tokens

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


def small(**kwargs):
    torch.manual_seed(0)
    vit = build_masked_backbone("small_vit", backbone_kwargs=SIZES | kwargs).module.double().eval()
    with torch.no_grad():
        vit.masked.mask_token.normal_()  # zeros would hide where it goes
    return vit


def images(size=16, count=3):
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def plain(vit, x, **kwargs):
    return plain_tokens(dict(vit.named_parameters()), x, patch=4, heads=3, **kwargs)


@pytest.mark.parametrize("size", [16, 8, 24])
def test_masked_patches_are_replaced_before_their_positions(size):
    vit, x = small(), images(size)
    mask = torch.rand(3, (size // 4) ** 2, generator=torch.Generator().manual_seed(2)) < 0.5
    tokens = vit.tokens(x, mask=mask)
    expected = plain(vit, x, mask=mask)
    torch.testing.assert_close(tokens.features, expected[:, 0])
    torch.testing.assert_close(tokens.patches, expected[:, 1:])
    whole = vit.tokens(x)
    torch.testing.assert_close(whole.patches, plain(vit, x)[:, 1:])
    torch.testing.assert_close(vit(x), whole.features)
    assert not torch.allclose(whole.features, tokens.features)


def test_only_kept_patches_enter_the_blocks():
    vit, x = small(), images()
    keep = torch.tensor([[3, 0, 7], [15, 14, 2], [1, 2, 3]])
    tokens, expected = vit.tokens(x, keep=keep), plain(vit, x, keep=keep)
    torch.testing.assert_close(tokens.features, expected[:, 0])
    torch.testing.assert_close(tokens.patches, expected[:, 1:])
    others = x.clone()
    others[0, :, :4, 4:8] = 0  # patch 1 of the first image is not among its three
    torch.testing.assert_close(vit.tokens(others, keep=keep).patches, tokens.patches)


def test_registers_stay_out_of_patches_and_masks():
    vit, x = small(reg_tokens=4), images()
    mask = torch.arange(16).expand(3, -1) % 3 == 0
    keep = torch.tensor([[5, 6]] * 3)
    for kwargs in ({"mask": mask}, {"keep": keep}, {}):
        tokens, expected = vit.tokens(x, **kwargs), plain(vit, x, registers=True, **kwargs)
        torch.testing.assert_close(tokens.features, expected[:, 0])
        torch.testing.assert_close(tokens.patches, expected[:, 5:])


def test_a_masked_patch_is_not_seen():
    vit, x = small(), images()
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 6] = True  # row 1, column 2
    hidden = x.clone()
    hidden[:, :, 4:8, 8:12] = 0.123
    torch.testing.assert_close(vit.tokens(x, mask=mask).patches, vit.tokens(hidden, mask=mask).patches)
    assert not torch.allclose(vit.tokens(x).patches, vit.tokens(hidden).patches)


def test_mean_pooling_has_its_norm_behind_it():
    """lightly's adapter leaves `fc_norm` out; `forward` and `tokens` agree with timm."""
    vit, x = small(class_token=False, global_pool="avg"), images()
    with torch.no_grad():
        vit.vit.fc_norm.weight.normal_()
    torch.testing.assert_close(vit.tokens(x).features, vit.vit(x))
    torch.testing.assert_close(vit(x), vit.vit(x))


def test_start_values_and_weights_are_timms():
    torch.manual_seed(3)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **SIZES)
    torch.manual_seed(3)
    vit, width = build_masked_backbone("vit_tiny_patch16_224", backbone_kwargs=SIZES)
    assert width == 24
    state = vit.vit.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    fresh = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **SIZES)
    fresh.load_state_dict(state)
    x = images().float()
    assert torch.equal(fresh.eval()(x), vit.eval()(x))
    assert (vit.masked.mask_token == 0).all()
    assert vit.masked.mask_token.ndim >= 1
    assert vit.masked.mask_token.requires_grad
    assert not build_masked_backbone("small_vit", mask_token=False).module.masked.mask_token.requires_grad


def test_modules_are_used_as_they_are():
    vit = build_backbone("small_vit", backbone_kwargs=SIZES).module
    masked = build_masked_backbone(vit).module
    assert masked.vit is vit
    assert build_masked_backbone(masked).module is masked
    again = copy.deepcopy(masked)
    assert again.vit is not vit
    assert again.tokens(images().float()).patches.shape == (3, 16, 24)


def test_small_vit():
    vit, width = build_backbone("small_vit")
    assert width == 192
    assert len(vit.blocks) == 6
    for size in (32, 16):
        assert vit(images(size).float()).shape == (3, 192)
    assert build_backbone("small_vit", backbone_kwargs={"reg_tokens": 4, "in_chans": 1}).module.num_prefix_tokens == 5


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for enable in (False, True):
        vit = small().train()
        vit.set_grad_checkpointing(enable)
        mask = torch.arange(16).expand(3, -1) % 2 == 0
        vit.tokens(images(), mask=mask).patches.square().sum().backward()
        gradients.append({name: p.grad for name, p in vit.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_select_patches():
    patches = torch.rand(2, 6, 3)
    sets = torch.tensor([[[0, 5], [1, 1]], [[2, 3], [4, 0]]])
    expected = torch.stack([torch.stack([patches[b][sets[b, m]] for m in range(2)]) for b in range(2)])
    assert torch.equal(select_patches(patches, sets), expected)
    assert torch.equal(select_patches(patches, sets[:, 0]), expected[:, 0])
    with pytest.raises(ValueError, match=r"`indices` must be \(B, K\) or \(B, M, K\)"):
        select_patches(patches, torch.zeros(3, 2, dtype=torch.long))


CANNOT = {
    "resnet18": (ValueError, "resnet18"),
    "swin_tiny_patch4_window7_224": (ValueError, "swin_tiny"),
    "vit_small_patch16_dinov3": (ValueError, "vit_small_patch16_dinov3"),
    "small_convnet": (TypeError, "SmallConvNet"),
    "deit_tiny_distilled_patch16_224": (TypeError, "VisionTransformerDistilled"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_backbones_that_cannot_mask_are_refused_and_those_that_can_named(name):
    error, got = CANNOT[name]
    with pytest.raises(error, match=rf"can mask its patches.*got '{got}.*small_vit.*vit_\*.*vit_small_patch16_224"):
        build_masked_backbone(name)
    for method in (lc.IBOT, lc.DINOv2):
        with pytest.raises(error, match="can mask its patches"):
            method(name)


def test_modules_that_cannot_mask_are_refused():
    with pytest.raises(TypeError, match="got 'Flatten'"):
        MaskedViT(nn.Flatten())
    vit = build_backbone("small_vit", backbone_kwargs=SIZES | {"patch_drop_rate": 0.5}).module
    with pytest.raises(TypeError, match="without `patch_drop_rate`"):
        MaskedViT(vit)
    vit = build_backbone("small_vit", backbone_kwargs=SIZES | {"pos_embed": "none"}).module
    with pytest.raises(TypeError, match="with learned positions"):
        MaskedViT(vit)
    with pytest.raises(ValueError, match=r"`small_images` must be False.*patch_size=4"):
        build_masked_backbone("small_vit", small_images=True)


def test_bad_masks():
    vit, x = small(), images()
    with pytest.raises(ValueError, match=r"`mask` must have shape \(3, 16\), got \(3, 15\)"):
        vit.tokens(x, mask=torch.zeros(3, 15, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`keep` must have shape \(3, K\), got \(2, 4\)"):
        vit.tokens(x, keep=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`images` must be square, got \(16, 8\)"):
        vit.tokens(x[..., :8])
