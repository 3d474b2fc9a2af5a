"""DINOv2's own properties."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.methods import dinov2
from lightning_contrast.nn import dinov2_masks
from lightning_contrast.optim.layer_decay import layer_rates
from tests.launch import run_processes
from tests.methods.cases import CASES, make, tiny_vit
from tests.methods.references import dinov2_loss
from tests.methods.test_contract import BATCH, BATCHES, Data, gradients, rows_of, run_step, trainer
from tests.methods.test_dino import fit, make_views
from tests.tolerances import CANCELLING, ROUNDED, f32, f64

CASE = CASES["DINOv2"]
SIZES = (16, 16, 8, 12)


@pytest.mark.parametrize("sizes", [(16, 16), (16, 16, 8), SIZES])
@pytest.mark.parametrize("name", ["DINOv2", "DINOv2 centres"])
def test_loss_and_gradient_equal_the_reference(name, sizes):
    module = make(name).double()
    with torch.no_grad():  # a teacher of its own, centres that have moved
        for _, teacher in module.momentum_pairs():
            for parameter in teacher.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    centers = [torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) * 0.1 for i in (0, 1)]
    for center, value in zip((module.center, module.patch_center), centers, strict=True):
        center.bits.copy_(value.float().view(torch.int32))
    views = make_views(sizes)
    torch.manual_seed(11)
    masks = dinov2_masks(2 * BATCH, (4, 4))
    assert masks.any(1).sum() == BATCH
    centers = [value.float().double() for value in centers]
    expected = dinov2_loss(module, views, masks, module.centering, 0.04, centers)
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)
    torch.manual_seed(11)
    out = run_step(module, [views])
    torch.testing.assert_close(out["loss"], expected, **f64(CANCELLING))
    out["loss"].backward()
    for (key, parameter), gradient in zip(trained.items(), grads, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, **f64(CANCELLING), msg=lambda text, key=key: f"{key}: {text}"
        )


def test_an_image_counts_once_however_many_patches_it_lacks(monkeypatch):
    module, views = make("DINOv2").double(), make_views((16, 16), count=2)
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[0, 3], masks[2, :9] = True, True
    monkeypatch.setattr(dinov2, "dinov2_masks", lambda *_, **__: masks)
    found = run_step(module, [views])["loss"]
    torch.testing.assert_close(found, dinov2_loss(module, views, masks, "sinkhorn", 0.04))


def some_masks(images, grid, *, places, **settings):
    """Masks of the images at these places of the batch of all ranks, in unequal numbers."""
    masks = torch.zeros(2, BATCH, grid[0] * grid[1], dtype=torch.bool)
    for image in range(BATCH):
        masks[0, image, : image % 5], masks[1, image, image : image + 2] = True, image > 5
    return masks[:, places].reshape(images, -1)


def rank_gradients(rank, name, world_size):
    places = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    dinov2.dinov2_masks = partial(some_masks, places=places)
    module = make(name).double()
    grads = gradients(module, rows_of([make_views((16, 16, 8))], places))
    for gradient in grads.values():  # what DDP does
        torch.distributed.all_reduce(gradient)
        gradient /= world_size
    for center in module.step_states():
        center.commit()
    return grads | {"center": module.center.value.double(), "patch center": module.patch_center.value.double()}


@pytest.mark.dist
@pytest.mark.parametrize("name", ["DINOv2", "DINOv2 centres"])
def test_two_ranks_with_unequal_numbers_of_masked_patches_give_the_gradient_of_one(name, monkeypatch):
    monkeypatch.setattr(dinov2, "dinov2_masks", partial(some_masks, places=slice(None)))
    module = make(name).double()
    alone = gradients(module, [make_views((16, 16, 8))])
    for center in module.step_states():
        center.commit()
    alone |= {"center": module.center.value.double(), "patch center": module.patch_center.value.double()}
    for found in run_processes(rank_gradients, 2, name, 2):
        assert found.keys() == alone.keys()
        for key, gradient in found.items():
            # timm resamples position embeddings in float32, whatever their dtype
            limit = f32(ROUNDED, size=0.1) if key.endswith("pos_embed") else f64(CANCELLING)
            torch.testing.assert_close(gradient, alone[key], **limit, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_rates_of_the_layers(tmp_path):
    module = make("DINOv2", layer_decay=0.5, patch_lr_multiplier=0.2, optimizer="adamw", lr=0.01, warmup_epochs=1)
    vit, rates = module.backbone.vit, layer_rates(module.backbone, 0.5, 0.2)
    assert rates[vit.patch_embed.proj.weight] == pytest.approx(0.5**3 * 0.2)  # two blocks
    assert rates[vit.pos_embed] == rates[vit.cls_token] == rates[module.backbone.masked.mask_token] == 0.5**3
    assert rates[vit.blocks[0].attn.qkv.weight] == 0.5**2
    assert rates[vit.blocks[1].mlp.fc1.bias] == 0.5
    assert vit.norm.weight not in rates
    run = trainer(tmp_path, CASE, epochs=3, limit_val_batches=0)
    run.fit(module, Data(BATCH))
    rates = layer_rates(module.backbone, 0.5, 0.2)
    groups = run.optimizers[0].param_groups
    held = {id(p): group for group in groups for p in group["params"]}
    assert held.keys() == {id(p) for p in module.parameters() if p.requires_grad}
    for parameter in module.parameters():
        if parameter.requires_grad:
            rate, group = rates.get(parameter, 1.0), held[id(parameter)]
            assert group["initial_lr"] == pytest.approx(0.01 * rate)
            assert group["lr"] == pytest.approx(1e-6 * rate)  # the end is multiplied too
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert {
        id(p) for p in (vit.pos_embed, vit.patch_embed.proj.weight, module.projector.last_layer.weight_g)
    } <= decayed
    assert id(vit.patch_embed.proj.bias) not in decayed
    last = 0.2 + 0.5 * (0.04 - 0.2) * (1 + math.cos(math.pi * (3 * BATCHES - 1) / (3 * BATCHES)))
    assert all(group["weight_decay"] in (0.0, pytest.approx(last)) for group in groups)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
def test_teacher_temperature_rises_in_every_step():
    seen = []

    class Noted(dinov2.DINOv2):
        def training_step(self, batch, batch_idx):
            seen.append(self.teacher_temperature)
            return super().training_step(batch, batch_idx)

    settings = {"num_prototypes": 12, "hidden_dim": 16, "lr": 0.01, "warmup_epochs": 0}
    module = Noted(tiny_vit(), warmup_teacher_temperature_epochs=2, **settings).double()
    assert module.teacher_temperature == 0.04  # before there is a Trainer
    fit(module, [make_views((16, 16), count=4)] * 4, 3, accumulate_grad_batches=2)
    expected = [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]  # two steps an epoch, four in the warm-up
    assert seen == pytest.approx([value for value in expected for _ in range(2)])


@pytest.mark.slow
def test_paper_defaults(tmp_path):
    module = lc.DINOv2(tiny_vit(), num_prototypes=12, hidden_dim=16, warmup_epochs=1)
    run = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    run.fit(module, Data(BATCH))
    peak = max(group["initial_lr"] for group in run.optimizers[0].param_groups)
    assert peak == pytest.approx(2e-4 * math.sqrt(BATCH / 1024))
    update = next(c for c in run.callbacks if isinstance(c, MomentumUpdate))
    assert (update.start, update.end, update.schedule, update.buffers) == (0.994, 1.0, "cosine", "none")
    assert module.step_states() == []  # balanced targets need no centre
    with torch.device("meta"):
        paper = lc.DINOv2("vit_small_patch14_dinov2", backbone_kwargs={"img_size": 224, "reg_tokens": 4})
    assert paper.projector.last_layer.weight_v.shape == (131072, 384)
    assert paper.patch_projector.last_layer.weight_v.shape == (131072, 256)
    assert paper.projector.last_layer.weight_g.requires_grad
    vit = paper.backbone.vit
    assert vit.num_prefix_tokens == 5
    assert vit.blocks[0].ls1.gamma.shape == (384,)
    assert vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.4)
    assert paper.momentum_backbone.vit.blocks[-1].drop_path1.drop_prob == 0
    assert paper.mask_settings == {"probability": 0.5, "ratio": (0.1, 0.5)}
    schedules = paper.schedules
    assert (schedules.warmup_teacher_temperature, schedules.teacher_temperature) == (0.04, 0.07)
    assert schedules.warmup_teacher_temperature_epochs == 30
    assert paper.student_temperature == 0.1
    assert (paper.koleo_weight, paper.patch_weight, paper.centering) == (0.1, 1.0, "sinkhorn")
    assert (schedules.clip_grad, schedules.freeze_last_layer_epochs, schedules.final_weight_decay) == (3.0, 1, 0.2)
    assert (paper.warmup_epochs, paper.patch_lr_multiplier, paper.layer_decay) == (80, 0.2, 1.0)


@pytest.mark.slow
def test_both_last_layers_are_frozen_at_first(tmp_path):
    module = make("DINOv2", freeze_last_layer_epochs=1)
    layers = module.projector.last_layer, module.patch_projector.last_layer
    assert module.last_layers() == list(layers)
    before = [layer.weight_v.detach().clone() for layer in layers]
    run = trainer(tmp_path, CASE, epochs=1, limit_val_batches=0)
    run.fit(module, Data(BATCH))
    assert all(torch.equal(layer.weight_v, old) for layer, old in zip(layers, before, strict=True))
    run.fit_loop.max_epochs = 2
    run.fit(module, Data(BATCH))
    assert not any(torch.equal(layer.weight_v, old) for layer, old in zip(layers, before, strict=True))


def test_heads():
    shared = make("DINOv2 centres")
    assert shared.patch_projector is None
    assert len(shared.momentum_pairs()) == 2
    assert shared.step_states() == [shared.center, shared.patch_center]
    own = nn.Linear(16, 12), nn.Linear(16, 12)
    module = make("DINOv2", projector=own[0], patch_projector=own[1])
    assert (module.projector, module.patch_projector) == own
    assert len(module.momentum_pairs()) == 3
    assert torch.isfinite(run_step(module, [make_views(SIZES, torch.float32)])["loss"])


def test_registers_and_layer_scale():
    module = lc.DINOv2(
        "small_vit",
        backbone_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 4},
        num_prototypes=12,
        hidden_dim=16,
    )
    assert module.backbone.vit.blocks[0].ls1.gamma.detach().unique() == pytest.approx(1e-5)
    run_step(module, [make_views((32, 32, 16, 24), torch.float32, count=4)])["loss"].backward()
    assert module.backbone.vit.reg_token.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("centering", ["sinkhorn", "mean"])
def test_large_scores_stay_finite(scale, centering):
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 12)

        def forward(self, x):
            return scale * F.normalize(self.linear(x), dim=1)

    module = make("DINOv2", projector=Loud(), patch_projector=Loud(), centering=centering)
    for _ in range(2):
        loss = run_step(module, [make_views(SIZES, torch.float32)])["loss"]
        for center in module.step_states():
            center.commit()
        loss.backward()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)


def test_logs_are_tensors():
    module, logged = make("DINOv2"), {}
    module.log = lambda name, value, **kwargs: logged.update({name: value})
    out = module.training_step([make_views(SIZES, torch.float32)], 0)
    assert all(isinstance(value, torch.Tensor) for value in logged.values())
    total = logged["train/class_loss"] + logged["train/patch_loss"] + 0.1 * logged["train/koleo_loss"]
    torch.testing.assert_close(total, out["loss"])
    assert {"train/teacher_entropy", "train/prototype_entropy", "train/agreement"} <= set(logged)
    # Balanced: all prototypes are in use.
    assert logged["train/prototype_entropy"] == pytest.approx(math.log(12), abs=0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"student_temperature": 0.0}, "`student_temperature` must be > 0"),
        ({"teacher_temperature": -0.1}, "`teacher_temperature` must be > 0"),
        ({"num_prototypes": 1}, "`num_prototypes` must be >= 2"),
        ({"centering": "sinkhorn_knopp"}, "`centering` must be one of 'sinkhorn', 'mean'.*Did you mean 'sinkhorn'"),
        ({"mask_probability": 1.5}, r"`mask_probability` must lie in \[0, 1\]"),
        ({"mask_ratio": (0.5, 0.1)}, "`mask_ratio` must be an ordered pair"),
        ({"koleo_weight": -0.1}, "`koleo_weight` must be >= 0"),
        ({"layer_decay": 0.0}, "`layer_decay` must be > 0"),
        ({"patch_lr_multiplier": 0.0}, "`patch_lr_multiplier` must be > 0"),
        ({"momentum": -0.1}, r"`momentum` must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make("DINOv2", **kwargs)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 16, 10), r"`images` must have sides that are multiples of \(4, 4\)"),
        ((16, 8), "`views` must begin with two global views of one size"),
        ((16, 16, 16, 8), "`views` must begin with 2 global views"),
    ],
)
def test_bad_views(sizes, message):
    with pytest.raises(ValueError, match=message):
        run_step(make("DINOv2"), [make_views(sizes, torch.float32), torch.zeros(BATCH)])
