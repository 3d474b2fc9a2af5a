"""Rotary positions: official values, relative positions, networks with registers, checkpoints and exports."""

import json
from pathlib import Path

import pytest
import torch

import lightning_contrast as lc
from lightning_contrast.nn import Rope, build_masked_backbone, rope_positions, small_vit, use_rope
from tests.tolerances import FORMULA, NETWORK, f32

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parents[1] / "official_dense.json").read_text(encoding="utf-8"))
}


def test_positions_equal_the_reference_implementation():
    record = RECORDS["rope"]
    torch.testing.assert_close(rope_positions(**record["params"]), torch.tensor(record["value"]), **f32(NETWORK))


def test_similarities_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 8)
    rope = Rope(prefix=0)
    found = rope(query.expand(1, 1, 16, 8)) @ rope(key.expand(1, 1, 16, 8)).mT  # (1, 1, 16, 16)
    grid = found.view(4, 4, 4, 4)  # row and column of the query, then of the key
    torch.testing.assert_close(grid[:3, :3, :3, :3], grid[1:, 1:, 1:, 1:], **f32(NETWORK))
    assert (grid[0, 0, 0, 1] - grid[0, 0, 0, 0]).abs() > 1e-3


def test_class_and_register_tokens_stay():
    rows = torch.randn(2, 3, 3 + 4, 8)
    turned = Rope(prefix=3)(rows)
    assert torch.equal(turned[:, :, :3], rows[:, :, :3])
    torch.testing.assert_close(turned.norm(dim=3), rows.norm(dim=3), **f32(FORMULA))
    assert not torch.equal(turned[:, :, 3:], rows[:, :, 3:])
    assert Rope(prefix=3)(rows.bfloat16()).dtype == torch.bfloat16


def tiny(**kwargs):
    return {"embed_dim": 16, "depth": 2, "num_heads": 2} | kwargs


def test_a_network_with_rope_knows_where_patches_are():
    torch.manual_seed(0)
    plain, rope = small_vit(**tiny(reg_tokens=2)).eval(), small_vit(rope=True, **tiny(reg_tokens=2)).eval()
    assert not rope.pos_embed.requires_grad
    assert not rope.pos_embed.any()
    rope.blocks[0].attn.qkv.weight.data.mul_(8)  # at the start scores are small, and all patches equal
    images = torch.randn(1, 3, 32, 32)
    moved = images.roll(16, 3)
    with torch.no_grad():
        assert not torch.allclose(rope(images), rope(moved))
        for block in rope.blocks:
            block.attn.q_norm = block.attn.k_norm = torch.nn.Identity()
        torch.testing.assert_close(rope(images), rope(moved), **f32(NETWORK))  # a set of patches
        assert plain(images).shape == (1, 16)


def test_views_of_all_square_sizes_with_masks():
    network = build_masked_backbone("small_vit", backbone_kwargs={"rope": True} | tiny()).module
    for size in (32, 16):
        images = torch.randn(2, 3, size, size)
        mask = torch.zeros(2, (size // 4) ** 2, dtype=torch.bool)
        assert network.tokens(images, mask=mask).patches.shape == (2, (size // 4) ** 2, 16)
    for kept in (10, 4):  # also where they could form a square of their own
        with pytest.raises(ValueError, match="`backbone` must have no rotary positions where patches are dropped"):
            network.tokens(images, keep=torch.arange(kept).expand(2, -1))
    with pytest.raises(ValueError, match=r"`patches` must form a square grid, got 10\. RoPE needs square views"):
        Rope(prefix=0)(torch.randn(1, 1, 10, 8))


def test_an_exported_network_is_loaded_with_its_positions(tmp_path):
    module = lc.DINO("small_vit", backbone_kwargs={"rope": True} | tiny(), num_prototypes=8, hidden_dim=8).eval()
    spec = {"size": 32, "mean": None, "std": None}
    path = lc.export.export(module, tmp_path / "backbone.pt", input_spec=spec)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(lc.export.load_backbone(path)(images), module(images), **f32(NETWORK))


def test_bad_input():
    with pytest.raises(ValueError, match="`dim` must be a multiple of 8, 4 x heads, got 12"):
        rope_positions(12, 2, 2, 2)
    with pytest.raises(ValueError, match="`height` must be >= 1"):
        rope_positions(16, 2, 0, 2)
    with pytest.raises(TypeError, match="`vit` must have no `qk_norm`, got 'LayerNorm'"):
        use_rope(small_vit(**tiny(qk_norm=True)))
    with pytest.raises(ValueError, match="heads of a width that is a multiple of 4, got 6"):
        use_rope(small_vit(**tiny(embed_dim=12)))
