"""DINO's own properties."""

import math
from dataclasses import replace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from tests.callbacks.strategies import STRATEGIES, TakeWeights, fit_ranks
from tests.launch import run_processes
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.references import DINOReference, Moves
from tests.methods.test_contract import BATCH, BATCHES, Data, run_step, step_batch, trainer
from tests.tolerances import CANCELLING, NETWORK, ROUNDED, f32, f64

CASE = CASES["DINO"]
SIZES = (16, 16, 8, 12)  # two global views, two local ones of unequal sizes
PATCH4 = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def make_views(sizes=SIZES, dtype=torch.float64, seed=5, count=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 3, size, size, generator=generator, dtype=dtype) for size in sizes]


def as_is(batch):
    return batch


def fit(module, batches, epochs, callbacks=(), **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "logger": False, "precision": "64-true", "limit_val_batches": 0}
    run = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **(settings | quiet | kwargs))
    run.fit(module, DataLoader(batches, batch_size=None, collate_fn=as_is))
    return run


class Losses(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_the_reference(accumulate):
    """Both schedules, the clipping, the frozen layer, the temperatures, teacher and centre; epochs of two steps."""
    settings = {"lr": 0.01, "warmup_epochs": 1, "optimizer": "adamw", "warmup_teacher_temperature_epochs": 2}
    module = make("DINO", norm=False, clip_grad=0.01, **settings).double()
    batches = [make_views(seed=seed) for seed in range(2 * accumulate)]
    program = DINOReference(module, total=6, warmup=2, lr=0.01)
    for epoch in range(3):
        for step in range(2):
            micro_batches = batches[step * accumulate : (step + 1) * accumulate]
            temperature = (0.04, 0.07, 0.07)[epoch]
            program.step(2 * epoch + step, epoch, [(views, temperature) for views in micro_batches])
    losses = Losses()
    run = fit(module, batches, 3, [losses], accumulate_grad_batches=accumulate)
    assert run.global_step == 6
    torch.testing.assert_close(losses.seen, program.losses, **f64(CANCELLING))
    for part, net, expected in zip((0, 1), (module.backbone, module.projector), program.weights, strict=True):
        for key, value in net.named_parameters():
            torch.testing.assert_close(value, expected[key], **f64(CANCELLING), check_device=False)
        teacher = (module.momentum_backbone, module.momentum_projector)[part]
        for key, value in teacher.named_parameters():
            torch.testing.assert_close(value, program.teacher[part][key], **f64(CANCELLING))
    torch.testing.assert_close(module.center.value.double(), program.centers[0], **f32(ROUNDED))
    assert program.centers[0].abs().max() > 1e-3


def sharded_fit(rank, name):
    share = [[view[rank::2] for view in make_views(seed=seed, dtype=torch.float32)] for seed in range(2)]
    watch = TakeWeights()
    data = DataLoader(share, batch_size=None, collate_fn=as_is)
    module = make("DINO", norm=False, clip_grad=0.01)
    settings = {"max_epochs": 2, "use_distributed_sampler": False, "limit_val_batches": 0}
    fit_ranks(module, [watch], data, name, **settings)
    return watch.history[-1], module.center.value, watch.local_share


@pytest.mark.dist
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
def test_every_strategy_equals_one_process(name):
    """Clipping of whole tensors, the last layer frozen in epoch 0 and trained in epoch 1, teacher and centre."""
    module = make("DINO", norm=False, clip_grad=0.01)
    start = module.projector.last_layer.weight_v.detach().clone()
    fit(module, [make_views(seed=seed, dtype=torch.float32) for seed in range(2)], 2, precision="32-true")
    assert not torch.equal(module.projector.last_layer.weight_v, start)
    for weights, center, local_share in run_processes(sharded_fit, 2, name, init=False):
        assert local_share == 1 if name == "ddp" else local_share < 0.7
        assert weights.keys() == dict(module.named_parameters()).keys()
        for key, value in module.named_parameters():
            torch.testing.assert_close(weights[key], value.detach(), **f32(NETWORK, size=0.01))
        torch.testing.assert_close(center, module.center.value, **f32(NETWORK, size=0.01))


class Passes:
    """Notes what goes through a module."""

    def __init__(self, module):
        self.shapes = []
        module.register_forward_pre_hook(lambda _, args: self.shapes.append(tuple(args[0].shape)))


@pytest.mark.parametrize(
    ("sizes", "student"),
    [
        ((16, 16), [(16, 16)]),
        ((16, 16, 8), [(16, 16), (8, 8)]),
        ((16, 16, 8, 8, 8), [(16, 16), (24, 8)]),
        ((16, 16, 8, 12), [(16, 16), (8, 8), (8, 12)]),
        ((16, 12, 8), [(8, 16), (8, 12), (8, 8)]),
    ],
)
def test_one_pass_for_each_size_and_global_views_only_for_the_teacher(sizes, student):
    module = make("DINO")
    passes = Passes(module.backbone), Passes(module.momentum_backbone), Passes(module.projector)
    out = run_step(module, [make_views(sizes, torch.float32), torch.zeros(BATCH)])
    assert torch.isfinite(out["loss"])
    assert [(shape[0], shape[-1]) for shape in passes[0].shapes] == student
    assert [shape[-1] for shape in passes[1].shapes] == ([16] if sizes[1] == 16 else [16, 12])
    assert sum(shape[0] for shape in passes[1].shapes) == 2 * BATCH
    assert passes[2].shapes == [(len(sizes) * BATCH, 8)]


def test_features_are_those_of_the_first_view():
    module = make("DINO").eval()
    views = make_views(dtype=torch.float32)
    torch.testing.assert_close(run_step(module, [views])["features"], module(views[0]))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
def test_teacher_and_centre_move_once_per_optimizer_step(tmp_path):
    moves = Moves(lambda module: [module.center.value, next(module.momentum_backbone.parameters())])
    run = trainer(tmp_path, CASE, epochs=2, callbacks=[moves], accumulate_grad_batches=3, limit_val_batches=0)
    run.fit(make("DINO", momentum=0.9), Data(BATCH))
    assert run.global_step == 2 * math.ceil(BATCHES / 3)
    assert moves.counts == [run.global_step] * 2


def test_last_layer_is_frozen_in_the_first_epochs(tmp_path):
    class Weights(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append(pl_module.projector.last_layer.weight_v.detach().clone())

    module, watch = make("DINO", freeze_last_layer_epochs=2, weight_decay=0.1, optimizer="adamw"), Weights()
    start = module.projector.last_layer.weight_v.detach().clone()
    run = trainer(tmp_path, CASE, epochs=3, callbacks=[watch], limit_val_batches=0, gradient_clip_val=1.0)
    run.fit(module, Data(BATCH))
    assert [torch.equal(start, weights) for weights in watch.seen] == [True, True, False]


@pytest.mark.slow
def test_a_trainers_clipping_replaces_the_methods(tmp_path):
    class Norms(L.Callback):
        def __init__(self):
            self.seen = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.seen.append([p.grad.norm() for p in pl_module.parameters() if p.grad is not None])

    def norms(**kwargs):
        watch = Norms()
        run = trainer(tmp_path, CASE, epochs=1, callbacks=[watch], limit_val_batches=0, **kwargs)
        run.fit(make("DINO", clip_grad=1e-3), Data(BATCH))
        return [torch.stack(step) for step in watch.seen if step]

    own, trainers = norms(), norms(gradient_clip_val=0.01)
    assert all((step <= 1e-3 * 1.0001).all() and step.norm() > 1e-3 for step in own)
    assert any(step.max() > 1e-3 for step in trainers)
    assert all(step.norm() <= 0.01 * 1.0001 for step in trainers)


def test_a_fused_optimizer_under_a_gradient_scaler_is_refused():
    module = make("DINO")
    module._trainer = type("Trainer", (), {"precision_plugin": type("Plugin", (), {"scaler": object()})()})()
    optimizer = torch.optim.AdamW(module.projector.parameters(), fused=True)
    with pytest.raises(ValueError, match=r"`clip_grad` must be None for a fused optimizer under 16-mixed, got 3.0"):
        module.configure_gradient_clipping(optimizer)


@pytest.mark.slow
def test_paper_defaults(tmp_path):
    module = lc.DINO(TinyBackbone(), num_prototypes=12, hidden_dim=16, warmup_epochs=1)
    run = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    run.fit(module, Data(BATCH))
    optimizer = run.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.0005 * BATCH / 256)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)  # after the last step
    last = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * (2 * BATCHES - 1) / (2 * BATCHES)))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(last), 0.0]
    update = next(c for c in run.callbacks if isinstance(c, MomentumUpdate))
    assert (update.start, update.end, update.schedule, update.buffers) == (0.996, 1.0, "cosine", "none")
    assert (module.center.momentum, module.student_temperature, module.schedules.clip_grad) == (0.9, 0.1, 3.0)
    with torch.device("meta"):
        paper = lc.DINO("vit_small_patch16_224")
    assert paper.projector.last_layer.weight_v.shape == (65536, 256)
    assert paper.schedules.freeze_last_layer_epochs == 1
    assert paper.warmup_epochs == 10


def test_teacher_temperature_warms_up_by_epoch():
    module = make("DINO", warmup_teacher_temperature_epochs=30)

    class Clock:
        current_epoch = 0

    module._trainer = clock = Clock()
    seen = []
    for clock.current_epoch in (0, 1, 29, 30, 99):
        seen.append(module.teacher_temperature)
    assert seen == pytest.approx([0.04, 0.04 + 0.03 / 29, 0.07, 0.07, 0.07])
    module.schedules = replace(module.schedules, warmup_teacher_temperature_epochs=0)
    clock.current_epoch = 0
    assert module.teacher_temperature == 0.07


def test_a_vit_by_name_takes_unequal_views_and_only_the_student_drops_paths():
    torch.manual_seed(0)
    kwargs = PATCH4 | {"drop_path_rate": 0.5, "proj_drop_rate": 0.5}
    module = lc.DINO("vit_tiny_patch16_224", backbone_kwargs=kwargs, num_prototypes=12, hidden_dim=16, bottleneck_dim=8)
    assert module.training
    views = make_views((32, 32, 16, 24), torch.float32, count=4)
    assert run_step(module, [views])["features"].shape == (4, 24)
    assert not torch.equal(module.backbone(views[0]), module.backbone(views[0]))
    assert torch.equal(module.momentum_backbone(views[0]), module.momentum_backbone(views[0]))
    with torch.device("meta"):
        blocks = lc.DINO("vit_small_patch16_224").backbone.blocks
    assert blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_logs_entropy_and_agreement(tmp_path):
    module = make("DINO")
    logged = {}
    module.log = lambda name, value, **kwargs: logged.update({name: value})
    views = make_views((16, 16, 8), torch.float32)
    module.training_step([views], 0)
    assert all(isinstance(value, torch.Tensor) for value in logged.values())  # a number would wait for the device
    # Both views at once, since BatchNorm takes its statistics over both.
    joined = module.momentum_projector(module.momentum_backbone(torch.cat(views[:2])))
    targets = (joined / 0.04).softmax(1)
    entropy = -(targets * targets.log()).sum(1).mean()
    mean = targets.mean(0)
    torch.testing.assert_close(logged["train/teacher_entropy"], entropy)
    torch.testing.assert_close(logged["train/prototype_entropy"], -(mean * mean.log()).sum())
    student = module.projector(module.backbone(torch.cat(views[:2]))).argmax(1).view(2, -1)
    best = joined.argmax(1).view(2, -1).flip(0)
    torch.testing.assert_close(logged["train/agreement"], (student == best).float().mean())


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_scores_stay_finite(scale):
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 12)

        def forward(self, x):
            return scale * F.normalize(self.linear(x), dim=1)

    module = make("DINO", projector=Loud())
    for _ in range(2):
        loss = run_step(module, [make_views(dtype=torch.float32)])["loss"]
        module.center.commit()
        loss.backward()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)
    assert torch.isfinite(module.center.value).all()


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
@pytest.mark.slow
def test_resnet_with_sgd_and_lars(tmp_path):
    for optimizer in ("sgd", "lars"):
        kwargs = {
            "num_prototypes": 12,
            "hidden_dim": 16,
            "bottleneck_dim": 8,
            "optimizer": optimizer,
            "warmup_epochs": 0,
        }
        decays = {"weight_decay": 1e-4, "final_weight_decay": 1e-4}
        module = lc.DINO(TinyBackbone(norm=True), lr=0.03, **kwargs, **decays)
        run = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0, limit_train_batches=2)
        run.fit(module, Data(BATCH))
        assert run.optimizers[0].param_groups[0]["weight_decay"] == pytest.approx(1e-4)
        assert torch.isfinite(run.callback_metrics["train/loss"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"student_temperature": 0}, "`student_temperature` must be > 0, got 0"),
        ({"teacher_temperature": -0.1}, "`teacher_temperature` must be > 0, got -0.1"),
        ({"warmup_teacher_temperature": 0}, "`warmup_teacher_temperature` must be > 0, got 0"),
        ({"warmup_teacher_temperature_epochs": -1}, "`warmup_teacher_temperature_epochs` must be >= 0, got -1"),
        ({"center_momentum": 1.5}, r"`momentum` must lie in \[0, 1\], got 1.5|`center_momentum` must lie in"),
        ({"momentum": -0.1}, r"`momentum` must lie in \[0, 1\], got -0.1"),
        ({"num_prototypes": 1}, "`num_prototypes` must be >= 2, got 1"),
        ({"final_lr": -1}, "`final_lr` must be >= 0, got -1"),
        ({"final_weight_decay": -1}, "`final_weight_decay` must be >= 0, got -1"),
        ({"clip_grad": 0}, "`clip_grad` must be > 0, got 0. Give None for no clipping"),
        ({"freeze_last_layer_epochs": -1}, "`freeze_last_layer_epochs` must be >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make("DINO", **kwargs)


def test_bad_views_are_named():
    module = make("DINO")
    with pytest.raises(ValueError, match=r"`batch` must hold at least 2 views, got 1"):
        run_step(module, [make_views((16,), torch.float32)])
    with pytest.raises(ValueError, match=r"`views` must begin with 2 global views, got '3 of one size"):
        run_step(module, [make_views((16, 16, 16, 8), torch.float32)])
    with pytest.raises(ValueError, match="Add `ViewAugmentation"):
        run_step(module, step_batch(CASE)[0][0])
    kwargs = {"backbone_kwargs": PATCH4, "num_prototypes": 4, "hidden_dim": 8, "bottleneck_dim": 4}
    vit = lc.DINO("vit_tiny_patch16_224", **kwargs)
    with pytest.raises(ValueError, match=r"multiples of \(4, 4\) for this VisionTransformer, got \(18, 18\)"):
        run_step(vit, [make_views((32, 32, 18), torch.float32)])
    with pytest.raises(ValueError, match="scale"):
        lc.augment.dino_views(32, global_scale=(1.0, 0.4))


def test_a_final_rate_above_the_peak_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`final_lr` must be at most the peak of 0.05, got 0.1"):
        trainer(tmp_path, CASE, epochs=1).fit(make("DINO", final_lr=0.1), Data(BATCH))
