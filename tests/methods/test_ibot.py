"""iBOT's own properties."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from tests.launch import run_processes
from tests.methods.cases import CASES, make, tiny_vit
from tests.methods.references import IBOTReference, Moves
from tests.methods.test_contract import BATCH, BATCHES, Data, rows_of, run_step, step_batch, trainer
from tests.methods.test_dino import fit, make_views
from tests.tolerances import CANCELLING, ROUNDED, TRAINING, f32, f64

CASE = CASES["IBOT"]
SIZES = (16, 16, 8, 12)  # two global views, two local ones of unequal sizes


class Draws(L.Callback):
    """Seeds each micro-batch, so that the masks can be drawn once more."""

    def __init__(self):
        self.losses = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
@pytest.mark.parametrize(("name", "accumulate"), [("IBOT", 1), ("IBOT", 2), ("IBOT unshared", 1)])
@pytest.mark.slow
def test_training_equals_the_reference(name, accumulate):
    """Masks, both losses, all schedules, clipping, frozen layers, teacher and centres; epochs of two steps."""
    settings = {"lr": 0.01, "warmup_epochs": 1, "optimizer": "adamw", "warmup_teacher_temperature_epochs": 2}
    module = make(name, clip_grad=0.02, patch_teacher_temperature=0.06, **settings).double()
    layer = "last_layer" if name == "IBOT" else "patch_last_layer"
    batches = [make_views(SIZES, seed=seed, count=4) for seed in range(2 * accumulate)]
    program = IBOTReference(module, total=6, warmup=2, lr=0.01, layer=layer)
    for epoch in range(3):
        temperatures = [(0.04, 0.04), (0.07, 0.06), (0.07, 0.06)][epoch]
        for step in range(2):
            own = range(step * accumulate, (step + 1) * accumulate)
            micro_batches, seeds = [batches[i] for i in own], [100 * epoch + i for i in own]
            arguments = [(views, temperatures, seed) for views, seed in zip(micro_batches, seeds, strict=True)]
            program.step(2 * epoch + step, epoch, arguments)
    draws = Draws()
    run = fit(module, batches, 3, [draws], accumulate_grad_batches=accumulate)
    assert run.global_step == 6
    torch.testing.assert_close(draws.losses, program.losses, **f64(CANCELLING))
    online, teacher = zip(*module.momentum_pairs(), strict=True)
    for nets, weights in ((online, program.weights), (teacher, program.teacher)):
        for net, expected in zip(nets, weights, strict=True):
            for key, value in net.named_parameters():
                torch.testing.assert_close(value, expected[key], **f64(CANCELLING), check_device=False)
    for center, expected in zip(module.step_states(), program.centers, strict=True):
        torch.testing.assert_close(center.value.double(), expected, **f32(ROUNDED))
        assert expected.abs().max() > 1e-3


@pytest.mark.slow
def test_teacher_and_both_centres_move_once_per_optimizer_step(tmp_path):
    moves = Moves(
        lambda module: [module.center.value, module.patch_center.value, module.momentum_backbone.vit.norm.bias]
    )
    run = trainer(tmp_path, CASE, epochs=2, callbacks=[moves], accumulate_grad_batches=3, limit_val_batches=0)
    run.fit(make("IBOT", momentum=0.9), Data(BATCH))
    assert run.global_step == 2 * math.ceil(BATCHES / 3)
    assert moves.counts == [run.global_step] * 3


class Passes:
    def __init__(self, module):
        self.calls, tokens = [], module.tokens

        def masked(images, *, mask=None, keep=None):
            self.calls.append((len(images), images.shape[-1], mask is not None))
            return tokens(images, mask=mask, keep=keep)

        module.tokens = masked
        module.register_forward_pre_hook(lambda _, args: self.calls.append((len(args[0]), args[0].shape[-1], False)))


@pytest.mark.parametrize(
    ("sizes", "local"),
    [((16, 16), []), ((16, 16, 8), [(8, 8)]), ((16, 16, 8, 8, 8), [(24, 8)]), ((16, 16, 8, 12), [(8, 8), (8, 12)])],
)
def test_only_global_views_are_masked_and_only_they_reach_the_teacher(sizes, local):
    module = make("IBOT")
    student, teacher = Passes(module.backbone), Passes(module.momentum_backbone)
    out = run_step(module, [make_views(sizes, torch.float32), torch.zeros(BATCH)])
    assert torch.isfinite(out["loss"])
    assert out["features"].shape == (BATCH, 16)
    assert student.calls == [(2 * BATCH, 16, True)] + [(*call, False) for call in local]
    assert teacher.calls == [(2 * BATCH, 16, False)]


def test_mask_token_gets_a_gradient_where_nothing_is_masked():
    module = make("IBOT", mask_ratios=(0.0,), mask_spreads=(0.0,))
    out = run_step(module, [make_views((16, 16), torch.float32)])
    out["loss"].backward()
    assert (module.backbone.masked.mask_token.grad == 0).all()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.slow
def test_paper_defaults(tmp_path):
    module = lc.IBOT(tiny_vit(), num_prototypes=12, hidden_dim=16, warmup_epochs=1)
    run = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    run.fit(module, Data(BATCH))
    optimizer = run.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.0005 * BATCH / 256)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)  # after the last step
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    vit = module.backbone.vit
    assert {id(p) for p in (vit.pos_embed, vit.cls_token, module.backbone.masked.mask_token)} <= decayed
    update = next(c for c in run.callbacks if isinstance(c, MomentumUpdate))
    assert (update.start, update.end, update.schedule, update.buffers) == (0.996, 1.0, "cosine", "none")
    with torch.device("meta"):
        paper = lc.IBOT("vit_small_patch16_224")
    head = paper.projector
    assert head.last_layer.weight_v.shape == (8192, 256)
    assert not head.last_layer.weight_g.requires_grad
    assert head.patch_last_layer is None
    assert paper.backbone.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert paper.momentum_backbone.vit.blocks[-1].drop_path1.drop_prob == 0
    assert (paper.center.momentum, paper.patch_center.momentum) == (0.9, 0.9)
    assert paper.mask_settings == {"ratios": (0.0, 0.3), "spreads": (0.0, 0.2), "shape": "block"}
    schedules = paper.schedules
    assert (schedules.warmup_teacher_temperature, schedules.teacher_temperature) == (0.04, 0.07)
    assert schedules.warmup_teacher_temperature_epochs == 30
    assert paper.patch_teacher_temperature == 0.07
    assert (schedules.clip_grad, schedules.freeze_last_layer_epochs, schedules.final_weight_decay) == (3.0, 1, 0.4)
    assert paper.warmup_epochs == 10


class Loud(nn.Module):
    """A head with logits of a given size."""

    def __init__(self, scale):
        super().__init__()
        self.linear, self.scale = nn.Linear(16, 12), scale

    def forward(self, tokens, patches):
        return tuple(self.scale * F.normalize(self.linear(x), dim=1) for x in (tokens, patches))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_scores_stay_finite(scale):
    module = make("IBOT", projector=Loud(scale))
    for _ in range(2):
        loss = run_step(module, [make_views(SIZES, torch.float32)])["loss"]
        for center in module.step_states():
            center.commit()
        loss.backward()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)
    assert all(torch.isfinite(center.value).all() for center in module.step_states())


def test_logs_are_tensors():
    module, logged = make("IBOT"), {}
    module.log = lambda name, value, **kwargs: logged.update({name: value})
    out = module.training_step([make_views(SIZES, torch.float32)], 0)
    assert set(logged) == {
        f"train/{name}"
        for name in ("loss", "class_loss", "patch_loss", "teacher_entropy", "prototype_entropy", "agreement")
    }
    assert all(isinstance(value, torch.Tensor) for value in logged.values())  # a number would wait for the device
    torch.testing.assert_close(logged["train/class_loss"] + logged["train/patch_loss"], out["loss"])
    assert 0 < logged["train/teacher_entropy"] <= math.log(12)
    assert 0 <= logged["train/agreement"] <= 1


def test_weights_of_the_losses():
    views = [make_views(SIZES, torch.float32)]

    def loss(**weights):
        torch.manual_seed(3)
        module = make("IBOT", **weights)
        torch.manual_seed(4)
        return run_step(module, views)["loss"]

    one, other = loss(class_weight=1.0, patch_weight=0.0), loss(class_weight=0.0, patch_weight=1.0)
    torch.testing.assert_close(loss(class_weight=2.0, patch_weight=3.0), 2 * one + 3 * other)
    assert one > 0
    assert other > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"student_temperature": 0.0}, "`student_temperature` must be > 0"),
        ({"teacher_temperature": -0.1}, "`teacher_temperature` must be > 0"),
        ({"patch_teacher_temperature": 0.0}, "`patch_teacher_temperature` must be > 0"),
        ({"warmup_teacher_temperature": 0.0}, "`warmup_teacher_temperature` must be > 0"),
        ({"num_prototypes": 1}, "`num_prototypes` must be >= 2"),
        ({"momentum": 1.1}, r"`momentum` must lie in \[0, 1\]"),
        ({"center_momentum": -1}, r"`momentum` must lie in \[0, 1\]"),
        ({"patch_weight": -1.0}, "`patch_weight` must be >= 0"),
        ({"mask_ratios": (1.2,)}, "`mask_spreads` must have 1 numbers"),
        ({"mask_shape": "wave"}, "`mask_shape` must be one of"),
        ({"clip_grad": 0.0}, "`clip_grad` must be > 0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make("IBOT", **kwargs)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 16, 10), r"`images` must have sides that are multiples of \(4, 4\)"),
        ((16, 8), "`views` must begin with two global views of one size"),
        ((16,), "`batch` must hold at least 2 views, got 1"),
        ((16, 16, 16, 8), "`views` must begin with 2 global views, got '3 of one size"),
    ],
)
def test_bad_views(sizes, message):
    with pytest.raises(ValueError, match=message):
        run_step(make("IBOT"), [make_views(sizes, torch.float32), torch.zeros(BATCH)])


def fsdp2_fit(rank):
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.tensor import DTensor

    share = rows_of(step_batch(CASE), slice(rank * BATCH // 2, (rank + 1) * BATCH // 2))
    module = make("IBOT", norm=False, freeze_last_layer_epochs=1)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    fit(module, [share] * 2, 2, devices=2, strategy=strategy, precision="32-true", use_distributed_sampler=False)
    weight = module.backbone.masked.mask_token
    assert isinstance(weight, DTensor)
    assert weight.placements[0].is_shard()
    return {name: p.full_tensor().detach() for name, p in module.named_parameters()}


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_fsdp2_shards_the_mask_token_and_equals_one_process():
    module = make("IBOT", norm=False, freeze_last_layer_epochs=1)
    fit(module, [step_batch(CASE)] * 2, 2, precision="32-true")
    for weights in run_processes(fsdp2_fit, 2, init=False):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), **f32(TRAINING, size=0.01))
