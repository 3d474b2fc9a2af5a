"""MSN's own properties."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from tests.methods.cases import CASES, TinyBackbone, make, tiny_vit
from tests.methods.test_contract import BATCH, Data, run_step, step_batch, trainer
from tests.plain_transformer import AdamW, below, linear, published_decay, published_rate, vit
from tests.tolerances import AMPLIFIED, CANCELLING, NETWORK, f64, near

CASE = CASES["MSN"]
SIZES = (16, 16, 8, 8, 12)  # target, random anchor, focal views of two sizes
SHARED = {"hidden_dim": 16, "projection_dim": 8, "num_prototypes": 12, "warmup_epochs": 1}


def make_views(sizes=SIZES, seed=5, count=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 3, size, size, generator=generator, dtype=dtype) for size in sizes]


class Seeded(L.Callback):
    """Seeds each batch with its number, so that the reference can draw the same patches; keeps the losses."""

    def __init__(self):
        self.losses = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(len(self.losses))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


def fit(module, batches, epochs, callbacks=(), **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "logger": False, "precision": "64-true", "limit_val_batches": 0}
    run = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **(settings | quiet | kwargs))
    run.fit(module, DataLoader(batches, batch_size=None, collate_fn=list))
    return run


class Program:
    """The authors' training loop in plain float64, one image after the other: no code of the package."""

    def __init__(self, module, planned, warmup, lr, clip):
        named = {name: value.detach().clone() for name, value in module.named_parameters()}
        self.weights = {name: value for name, value in named.items() if not name.startswith("momentum_")}
        self.teacher = {name: value.clone() for name, value in self.weights.items() if name != "prototypes.weight"}
        self.trained = [name for name, value in module.named_parameters() if value.requires_grad]
        self.planned, self.warmup, self.lr, self.clip = planned, warmup, lr, clip
        self.optimizer, self.losses = AdamW(), []

    def project(self, weights, view, keep=None):
        rows = [vit(below(weights, "backbone.masked.vit."), image, keep, patch=4, heads=2)[0] for image in view]
        x = torch.stack(rows)  # class tokens
        head = below(weights, "projector.")
        layers = sorted({name.rsplit(".", 1)[0] for name in head})
        for number, layer in enumerate(layers):
            x = linear(x, head, layer)
            x = F.gelu(x) if number < len(layers) - 1 else x
        return x

    def loss(self, weights, views):
        keep = torch.randperm(16)[: math.floor(16 * 0.75)]
        anchors = torch.cat([self.project(weights, views[1], keep), *(self.project(weights, v) for v in views[2:])])
        target = self.project(self.teacher, views[0])
        prototypes = weights["prototypes.weight"]
        prototypes = prototypes / prototypes.norm(dim=1, keepdim=True)

        def chances(z):
            return ((z / z.norm(dim=1, keepdim=True)) @ prototypes.T / 0.1).exp()

        p = chances(anchors) / chances(anchors).sum(1, keepdim=True)
        with torch.no_grad():
            q = (chances(target) / chances(target).sum(1, keepdim=True)) ** 4
            q = (q / q.sum(1, keepdim=True)).T
            q = q / q.sum()
            for _ in range(3):
                q = q / q.sum(1, keepdim=True) / len(q)
                q = q / q.sum(0, keepdim=True) / q.shape[1]
            q = (q * q.shape[1]).T
        q = torch.cat([q] * (len(views) - 1))
        mean = p.mean(0)
        return -(q * p.log()).sum(1).mean() + math.log(12) + (mean * mean.log()).sum()

    def step(self, number, micro_batches):
        leaves = {name: value.detach().requires_grad_(name in self.trained) for name, value in self.weights.items()}
        losses = []
        for views in micro_batches:
            torch.manual_seed(len(self.losses) + len(losses))
            losses.append(self.loss(leaves, views))
        self.losses += [loss.item() for loss in losses]
        found = torch.autograd.grad(sum(losses) / len(losses), [leaves[name] for name in self.trained])
        gradients = dict(zip(self.trained, found, strict=True))
        encoder = [gradient for name, gradient in gradients.items() if name != "prototypes.weight"]
        length = torch.stack([gradient.norm() for gradient in encoder]).norm()
        assert length > self.clip
        factors = {name: 1 if name == "prototypes.weight" else self.clip / (length + 1e-6) for name in gradients}
        gradients = {name: factors[name] * gradient for name, gradient in gradients.items()}
        lr = published_rate(number, self.warmup, self.planned, start=0.2 * self.lr, peak=self.lr, final=1e-6)
        decay = published_decay(number, self.planned, 0.04, 0.4)
        decays = {n: 0 if self.weights[n].ndim == 1 or n == "prototypes.weight" else decay for n in gradients}
        self.weights = self.optimizer.step(self.weights, gradients, lr, decays)
        momentum = 0.996 + number * (1 - 0.996) / self.planned
        for name, old in self.teacher.items():
            self.teacher[name] = momentum * old + (1 - momentum) * self.weights[name].detach()


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.slow
def test_training_equals_the_reference(accumulate):
    """All schedules, the clipping, the dropped patches, Sinkhorn, prototypes and teacher; epochs of two steps."""
    module = make("MSN", norm=False, patch_drop=0.25, clip_grad=1e-3, lr=0.01, warmup_epochs=1, optimizer="adamw")
    module = module.double()
    batches = [make_views(seed=seed) for seed in range(2 * accumulate)]
    program = Program(module, planned=5, warmup=2, lr=0.01, clip=1e-3)  # int(1.25 x 4 steps)
    for number in range(4):
        step = number % 2
        program.step(number, batches[step * accumulate : (step + 1) * accumulate])
    seeded = Seeded()
    run = fit(module, batches, 2, [seeded], accumulate_grad_batches=accumulate)
    assert run.global_step == 4
    torch.testing.assert_close(seeded.losses, program.losses, **f64(CANCELLING))
    found = dict(module.named_parameters())
    for name, expected in program.weights.items():
        torch.testing.assert_close(found[name].detach(), expected.detach(), **f64(AMPLIFIED, size=1e-3))
    for name, expected in program.teacher.items():
        torch.testing.assert_close(found[f"momentum_{name}"], expected, **f64(AMPLIFIED, size=1e-3))
    assert (found["prototypes.weight"] - found["prototypes.weight"].mean()).abs().max() > 0.01


class Passes:
    """Notes what goes through a module."""

    def __init__(self, module):
        self.shapes = []
        module.register_forward_pre_hook(lambda _, args: self.shapes.append(tuple(args[0].shape)))


@pytest.mark.parametrize(
    ("sizes", "random_views", "student"),
    [
        ((16, 16), 1, [(4, 13)]),  # 12 of 16 patches and the class token
        ((16, 16, 8), 1, [(4, 13), (4, 5)]),
        ((16, 16, 16), 1, [(4, 13), (4, 17)]),  # a focal view of the same size keeps its patches
        ((16, 16, 8, 8, 12), 1, [(4, 13), (8, 5), (4, 10)]),
        ((16, 16, 16, 8), 2, [(8, 13), (4, 5)]),
    ],
)
def test_views_of_all_sizes_and_which_of_them_lose_patches(sizes, random_views, student):
    module = make("MSN", random_views=random_views, patch_drop=0.25)
    online, teacher = Passes(module.backbone.vit.blocks[0]), Passes(module.momentum_backbone.vit.blocks[0])
    heads = Passes(module.projector)
    out = run_step(module, make_views(sizes, dtype=torch.float32))
    assert [shape[:2] for shape in online.shapes] == student
    assert [shape[:2] for shape in teacher.shapes] == [(4, 17)]
    assert [shape[0] for shape in heads.shapes] == [rows for rows, _ in student], "BatchNorm sees each size apart"
    assert out["features"].shape == (4, 16)
    assert torch.isfinite(out["loss"])


def test_dropped_patches_change_from_step_to_step_and_are_those_of_the_whole_batch():
    module = make("MSN", patch_drop=0.5).eval()
    seen = []
    tokens = module.backbone.tokens
    module.backbone.tokens = lambda images, keep=None: seen.append(keep) or tokens(images, keep=keep)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        run_step(module, make_views((16, 16), dtype=torch.float32))
    assert all(keep.shape == (4, 8) and (keep == keep[0]).all() for keep in seen)
    assert all(len(set(keep[0].tolist())) == 8 for keep in seen)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_no_drop_sees_the_whole_view():
    module = make("MSN", patch_drop=0.0)
    online = Passes(module.backbone.vit.blocks[0])
    run_step(module, make_views((16, 16), dtype=torch.float32))
    assert online.shapes == [(4, 17, 16)]


def test_head_and_prototypes_equal_the_reference():
    module = lc.MSN(tiny_vit())
    linears = [m for m in module.projector.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in linears] == [
        (16, 2048, True),
        (2048, 2048, True),
        (2048, 256, True),
    ]
    assert sum(isinstance(m, nn.BatchNorm1d) for m in module.projector.modules()) == 2
    weight = module.prototypes.weight
    assert weight.shape == (1024, 256)
    assert 0.0624 < weight.abs().max() <= 0.0625
    assert weight.std().item() == pytest.approx(0.0625 / math.sqrt(3), rel=0.01)


@pytest.mark.slow
def test_paper_defaults(tmp_path):
    module = lc.MSN(tiny_vit(), **SHARED)
    run = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    run.fit(module, Data(BATCH))
    optimizer = run.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(1e-3 * BATCH / 1024)
    decayed = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert id(module.prototypes.weight) not in decayed
    assert id(module.backbone.vit.cls_token) in decayed
    assert optimizer.param_groups[1]["weight_decay"] == 0
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(published_decay(7, 10, 0.04, 0.4))
    update = next(c for c in run.callbacks if isinstance(c, MomentumUpdate))
    assert (update.start, update.schedule) == (0.996, "linear")
    assert update.end == pytest.approx(0.996 + 0.004 / 1.25)
    assert (lc.MSN(tiny_vit()).warmup_epochs, module.patch_drop, module.schedules.clip_grad) == (15, 0.15, 3.0)
    logged = run.callback_metrics
    for name in ("teacher_entropy", "prototype_entropy"):
        assert 0 <= logged[f"train/{name}"] <= math.log(12) + 1e-5
    assert 0 <= logged["train/agreement"] <= 1


def test_statistics_see_a_collapse():
    module, logged = make("MSN", patch_drop=0.0).eval(), {}
    module.log = lambda name, value, **kwargs: logged.__setitem__(name, value.item())
    for parameter in module.prototypes.parameters():
        parameter.data[1:] = parameter.data[0]  # all alike: uniform targets
    view = make_views((16,), dtype=torch.float32)[0]
    module.training_step([view, view], 0)
    assert logged["train/teacher_entropy"] == near(math.log(12), NETWORK, size=1)
    assert logged["train/agreement"] == 1.0
    module.prototypes.weight.data[1:] = -module.prototypes.weight.data[:1]
    with torch.no_grad():
        direction = module.momentum_projector(module.momentum_backbone(view)).mean(0)
        module.prototypes.weight[0], module.prototypes.weight[1:] = direction, -direction
    module.training_step([view, view], 0)
    assert logged["train/teacher_entropy"] == pytest.approx(0.0, abs=1e-3)
    assert logged["train/prototype_entropy"] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_no_nan_for_extreme_scores(scale):
    module = make("MSN", temperature=1e-4)
    for parameter in module.projector.parameters():
        parameter.data.mul_(scale**0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run_step(module, make_views(dtype=torch.float32))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_backbone_by_name_takes_views_of_any_size():
    module = lc.MSN("small_vit", backbone_kwargs={"embed_dim": 24, "depth": 1}, **SHARED)
    assert module.hparams["backbone"] == "small_vit"
    out = run_step(module, make_views((32, 32, 16), dtype=torch.float32))
    assert out["features"].shape == (4, 24)
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"`temperature` must be > 0, got 0\.0"),
        ({"target_sharpen_temperature": -1.0}, "`target_sharpen_temperature` must be > 0"),
        ({"me_max_weight": -1.0}, "`me_max_weight` must be >= 0"),
        ({"patch_drop": 1.0}, r"`patch_drop` must lie in \[0, 1\)"),
        ({"random_views": 0}, "`random_views` must be >= 1"),
        ({"num_prototypes": 1}, "`num_prototypes` must be >= 2, got 1"),
        ({"momentum": 1.5}, r"`momentum` must lie in \[0, 1\]"),
        ({"schedule_stretch": 0.5}, r"`schedule_stretch` must lie in \[1, inf\)"),
        ({"warmup_start": 2.0}, r"`warmup_start` must lie in \[0, 1\]"),
        ({"clip_grad": 0.0}, "`clip_grad` must be > 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lc.MSN(tiny_vit(), **(SHARED | arguments))


def test_backbones_that_cannot_mask():
    with pytest.raises(TypeError, match="`backbone` must be a vision transformer that can mask its patches, got 'Tiny"):
        lc.MSN(TinyBackbone())
    with pytest.raises(ValueError, match=r"got 'resnet18'\. Choose 'small_vit', or one of timm's \"vit_"):
        lc.MSN("resnet18")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16,), r"`batch` must hold at least 2 views, got 1\. Give a policy that makes 2 global views"),
        ((16, 16, 16, 8), r"`views` must begin with 2 global views, got '3 of one size"),
        ((16, 16, 10), "`images` must have sides that are multiples of"),
    ],
)
def test_bad_views(sizes, message):
    with pytest.raises(ValueError, match=message):
        run_step(make("MSN"), [make_views(sizes, dtype=torch.float32), None])


def test_too_few_patches():
    with pytest.raises(ValueError, match=r"`patch_drop` must leave one of the 16 patches, got 0\.99"):
        run_step(make("MSN", patch_drop=0.99), make_views((16, 16), dtype=torch.float32))


def test_one_tensor_names_the_callback():
    with pytest.raises(ValueError, match=r"Add `ViewAugmentation"):
        run_step(make("MSN"), step_batch(CASE)[0][0])
