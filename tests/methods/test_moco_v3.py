"""MoCo v3's own properties."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.optim import LARS
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, Data, run_step, step_batch, trainer

CASE = CASES["MoCoV3"]
TINY_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}


def vit(**kwargs):
    heads = {"hidden_dim": 16, "projection_dim": 8}
    return lc.MoCoV3("vit_tiny_patch16_224", backbone_kwargs=TINY_VIT, **(heads | kwargs))


def dense_direction(query, key, temperature):
    """2 T times the cross entropy over the keys of the other view."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return 2 * temperature * F.cross_entropy(query @ key.T / temperature, torch.arange(len(query)))


def test_loss_is_the_papers_with_its_factor():
    module = make("MoCoV3", temperature=0.3).eval()
    (view_a, view_b), _ = batch = step_batch(CASE)
    queries = [module.predictor(module.projector(module.backbone(view))) for view in (view_a, view_b)]
    keys = [module.momentum_projector(module.momentum_backbone(view)) for view in (view_a, view_b)]
    expected = dense_direction(queries[0], keys[1], 0.3) + dense_direction(queries[1], keys[0], 0.3)
    torch.testing.assert_close(run_step(module, batch)["loss"], expected)


def heads(module):
    """Return for both heads the widths of their layers, the biases, and whether the output is normalized."""
    found = []
    for head in (module.projector, module.predictor):
        linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
        leaves = [m for m in head.modules() if not list(m.children())]
        found.append(([m.out_features for m in linears], any(m.bias is not None for m in linears), type(leaves[-1])))
    return found


def test_resnet_form(tmp_path):
    module = lc.MoCoV3(TinyBackbone(), hidden_dim=16, projection_dim=4, warmup_epochs=1)
    assert heads(module) == [([16, 4], False, nn.BatchNorm1d), ([16, 4], False, nn.Linear)]
    assert (module.temperature, module.weight_decay) == (1.0, 1e-6)
    assert lc.MoCoV3(TinyBackbone(), hidden_dim=16).warmup_epochs == 10
    fit = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    fit.fit(module, Data(BATCH))
    assert isinstance(fit.optimizers[0], LARS)
    assert fit.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(0.6 * BATCH / 256)
    update = next(c for c in fit.callbacks if isinstance(c, MomentumUpdate))
    assert (update.start, update.end, update.schedule) == (0.99, 1.0, "cosine")


def test_vit_form_with_frozen_patches(tmp_path):
    module = vit(warmup_epochs=1)
    assert heads(module) == [([16, 16, 8], False, nn.BatchNorm1d), ([16, 8], False, nn.BatchNorm1d)]
    assert (module.temperature, module.weight_decay, vit().warmup_epochs) == (0.2, 0.1, 40)
    patches = module.backbone.patch_embed.proj.weight.clone()
    fit = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    fit.fit(module, Data(BATCH))
    assert isinstance(fit.optimizers[0], torch.optim.AdamW)
    assert fit.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(1.5e-4 * BATCH / 256)
    assert torch.equal(module.backbone.patch_embed.proj.weight, patches)
    assert torch.equal(module.momentum_backbone.patch_embed.proj.weight, patches)
    assert vit(freeze_patches=False).backbone.patch_embed.proj.weight.requires_grad
    assert lc.MoCoV3.base_lr == 0.6, "a ViT's rate is its own"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"momentum": 2.0}, r"`momentum` must lie in"), ({"temperature": 0.0}, r"`temperature` must be > 0, got 0\.0")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lc.MoCoV3(TinyBackbone(), hidden_dim=16, **arguments)
