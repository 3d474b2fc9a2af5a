"""Attention maps against the softmax written out, their pictures, and scenes to look at."""

import runpy
import sys
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast import evaluation
from lightning_contrast.evaluation import attention_grid, attention_maps, compose_scenes
from lightning_contrast.evaluation.attention import strongest

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "dynamic_img_size": True}


def make_vit(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, **(SMALL | kwargs))
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight.normal_(std=0.5)  # so that attention is far from even
    return vit


def by_hand(vit, images):
    """Return the class token's attention in the last block, from the inputs of that block."""
    seen = []
    hook = vit.blocks[-1].norm1.register_forward_hook(lambda _, args, out: seen.append(out))
    vit(images)
    hook.remove()
    attention, tokens = vit.blocks[-1].attn, seen[0]
    queries, keys, _ = (tokens @ attention.qkv.weight.T + attention.qkv.bias).split(24, dim=2)
    maps = []
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        scores = torch.einsum("bd,bnd->bn", queries[:, 0, part], keys[:, :, part]) / 8**0.5
        maps.append(scores.exp() / scores.exp().sum(1, keepdim=True))
    return torch.stack(maps, 1)


@pytest.mark.parametrize(("size", "registers"), [((32, 32), 0), ((32, 48), 0), ((32, 32), 4)])
def test_maps_equal_the_softmax_written_out(size, registers):
    vit = make_vit(reg_tokens=registers).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = by_hand(vit, images)[:, :, 1 + registers :].unflatten(2, (size[0] // 8, size[1] // 8))
        before = vit(images)
        maps = attention_maps(vit, images)
        torch.testing.assert_close(maps, expected)
        assert torch.equal(vit(images), before)
    assert maps.flatten(2).max(2).values.mean() > 0.2
    assert not maps.requires_grad


def test_a_method_is_looked_at_through_its_backbone_and_left_as_it_was():
    torch.manual_seed(0)
    kwargs = {"num_prototypes": 4, "hidden_dim": 8, "bottleneck_dim": 4, "backbone_kwargs": SMALL}
    method = lc.DINO("vit_tiny_patch16_224", **kwargs)
    method.backbone.blocks[0].eval()
    modes = [module.training for module in method.modules()]
    fused = [module.fused_attn for module in method.modules() if hasattr(module, "fused_attn")]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(attention_maps(method, images), attention_maps(method.backbone, images))
    teacher = attention_maps(method.momentum_backbone, images, layer=0)
    assert teacher.shape == (2, 3, 4, 4)
    assert not torch.equal(teacher, attention_maps(method, images))
    assert [module.training for module in method.modules()] == modes
    assert [module.fused_attn for module in method.modules() if hasattr(module, "fused_attn")] == fused
    assert not any(module._forward_pre_hooks for module in method.modules())


def test_it_is_left_as_it_was_after_an_error():
    vit = make_vit()
    vit.blocks[-1].mlp = None
    fused = vit.blocks[-1].attn.fused_attn
    with pytest.raises(TypeError):
        attention_maps(vit, torch.randn(1, 3, 32, 32))
    assert vit.training
    assert vit.blocks[-1].attn.fused_attn == fused
    assert not vit.blocks[-1].attn.attn_drop._forward_pre_hooks


@pytest.mark.parametrize(
    ("model", "images", "kwargs", "error", "message"),
    [
        (lambda: nn.Linear(3, 3), (1, 3, 32, 32), {}, TypeError, "`model` must have self-attention.*got 'Linear'"),
        (
            lambda: make_vit(class_token=False, global_pool="avg"),
            (1, 3, 32, 32),
            {},
            ValueError,
            "`model` must have a class token",
        ),
        (make_vit, (1, 3, 32, 32), {"layer": 2}, ValueError, r"`layer` must lie in -2..1, got 2"),
        (make_vit, (1, 3, 33, 32), {}, ValueError, r"multiples of \(8, 8\)"),
    ],
)
def test_bad_models_are_named(model, images, kwargs, error, message):
    with pytest.raises(error, match=message):
        attention_maps(model(), torch.randn(images), **kwargs)


def test_strongest_patches_hold_the_mass():
    maps = torch.tensor([0.1, 0.4, 0.3, 0.2]).view(1, 1, 2, 2)
    assert strongest(maps, 0.6).flatten().tolist() == [False, True, True, False]
    assert strongest(maps, 0.35).flatten().tolist() == [False, True, False, False]
    assert not strongest(maps, 0.0).any()
    assert strongest(maps, 1.0).all()


@pytest.mark.parametrize("mass", [None, 0.6])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_grid_shows_each_image_and_its_heads(mass, dtype):
    images = (torch.rand(2, 3, 32, 32) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    maps = torch.rand(2, 3, 4, 4)
    figure = attention_grid(images, maps, mass=mass)
    assert len(figure.axes) == 2 * 4
    assert [axes.get_title() for axes in figure.axes[:4]] == ["image", "head 1", "head 2", "head 3"]
    named = attention_grid(images, maps, mass=mass, names=["a", "b", "c"])
    assert [axes.get_title() for axes in named.axes[:4]] == ["image", "a", "b", "c"]
    shown = torch.from_numpy(figure.axes[4 + 2].get_images()[0].get_array().data)  # second image, second head
    if mass is None:
        stretched = (maps[1, 1] - maps[1, 1].min()) / (maps[1, 1].max() - maps[1, 1].min())
        torch.testing.assert_close(shown[::8, ::8, 0], stretched)
    else:
        bright = strongest(maps, mass)[1, 1].repeat_interleave(8, 0).repeat_interleave(8, 1)
        picture = images[1].permute(1, 2, 0) / (255 if dtype == torch.uint8 else 1)
        torch.testing.assert_close(shown[bright], picture[bright])
        torch.testing.assert_close(shown[~bright], 0.15 * picture[~bright])


def test_scenes_hold_their_things_whole_and_apart():
    things = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 32, 32) * 40
    scenes, where = compose_scenes(things, 20, size=100, things=(2, 4), background=(255, 255, 255), seed=3)
    assert (scenes.shape, scenes.dtype, where.shape) == ((20, 3, 100, 100), torch.uint8, (20, 100, 100))
    assert torch.equal(where, (scenes != 255).any(1))
    counts, corners = set(), set()
    for scene in scenes:
        values = [int(v) for v in scene.unique() if v != 255]
        counts.add(len(values))
        for value in values:
            rows, columns = (scene[0] == value).nonzero(as_tuple=True)
            assert len(rows) == 32 * 32  # nothing covers a part of it, and it comes once
            assert rows.max() - rows.min() == columns.max() - columns.min() == 31
            corners.add((int(rows.min()), int(columns.min())))
    assert counts == {2, 3, 4}
    assert len(corners) > 20
    again, _ = compose_scenes(things, 20, size=100, things=(2, 4), seed=3)
    other, _ = compose_scenes(things, 20, size=100, things=(2, 4), seed=4)
    assert torch.equal(scenes, again)
    assert not torch.equal(scenes, other)


def test_scenes_of_emoji():
    images = lc.data.EmojiDataModule().images("test")
    scenes, where = compose_scenes(images, 3)
    assert scenes.shape == (3, 3, 96, 96)
    assert 0.05 < where.float().mean() < 0.5


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"count": 0}, ValueError, "`count` must be >= 1, got 0"),
        ({"count": 1, "size": 63}, ValueError, r"`things` must be ordered and lie in 1..1, got \(3, 4\)"),
        ({"count": 1, "things": (4, 3)}, ValueError, r"`things` must be ordered and lie in 1..5, got \(4, 3\)"),
    ],
)
def test_bad_scenes_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        compose_scenes(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), **kwargs)
    with pytest.raises(TypeError, match="`images` must be uint8"):
        compose_scenes(torch.zeros(5, 3, 32, 32), 1)


def test_bad_maps_are_named():
    with pytest.raises(ValueError, match=r"`maps` must be \(2, heads, h, w\), got \(3, 1, 4, 4\)"):
        attention_grid(torch.rand(2, 3, 8, 8), torch.rand(3, 1, 4, 4))
    with pytest.raises(ValueError, match=r"`mass` must lie in \[0, 1\], got 1.5"):
        attention_grid(torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4), mass=1.5)
    with pytest.raises(ValueError, match=r"`names` must be 1, got \['a', 'b'\]"):
        attention_grid(torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4), names=["a", "b"])


@pytest.mark.slow
def test_example_draws_what_a_run_saw(tmp_path, monkeypatch, capsys):
    kwargs = {"hidden_dim": 8, "bottleneck_dim": 4, "num_prototypes": 4}
    kwargs["backbone_kwargs"] = {"embed_dim": 24, "depth": 2}
    method = lc.DINO("small_vit", lr=1e-3, warmup_epochs=0, **kwargs)
    policy = lc.augment.dino_views(32, mean=[0.5] * 3, std=[0.25] * 3, local_views=1)
    fit = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[lc.ViewAugmentation(policy)],
    )
    fit.fit(method, lc.data.EmojiDataModule(4))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    example = Path(__file__).parents[2] / "examples" / "attention.py"
    monkeypatch.setattr(sys, "argv", ["attention.py", str(tmp_path / "run.ckpt"), "--output", str(tmp_path / "a.png")])
    seen = []
    real = evaluation.attention_maps
    monkeypatch.setattr(evaluation, "attention_maps", lambda model, images: seen.append(images) or real(model, images))
    runpy.run_path(str(example), run_name="__main__")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "share of the attention per head:" in capsys.readouterr().out
    assert seen[0].min() >= -2
    assert seen[0].max() == 2  # white, normalized like the views of the run
