"""I-JEPA's own properties."""

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.nn import JepaMasks, sincos_positions
from tests.launch import run_processes
from tests.methods.cases import CASES, TinyBackbone, make, tiny_patch_vit, tiny_vit
from tests.methods.test_contract import BATCH, Data, run_step, step_batch, trainer
from tests.methods.test_msn import Seeded, fit, make_views
from tests.plain_transformer import AdamW, below, blocks, linear, norm, published_decay, published_rate, vit
from tests.tolerances import AMPLIFIED, CANCELLING, f64, near

CASE = CASES["IJEPA"]
SMALL = {"predictor_dim": 16, "predictor_depth": 1, "min_keep": 2}


class Program:
    """The authors' training loop in plain float64, one image and one block after the other."""

    def __init__(self, module, planned, warmup, lr):
        named = {name: value.detach().clone() for name, value in module.named_parameters()}
        self.weights = {name: value for name, value in named.items() if not name.startswith("momentum_")}
        self.teacher = {name: value.clone() for name, value in below(self.weights, "backbone.masked.vit.").items()}
        self.trained = [name for name, value in module.named_parameters() if value.requires_grad]
        self.sampler, self.positions = module.mask_sampler, sincos_positions(16, (4, 4)).double()
        self.planned, self.warmup, self.lr = planned, warmup, lr
        self.optimizer, self.losses = AdamW(), []

    def loss(self, weights, images):
        masks = self.sampler(len(images))
        encoder, predictor = below(weights, "backbone.masked.vit."), below(weights, "predictor.")
        terms = []
        for image, context, targets in zip(images, masks.context, masks.targets, strict=True):
            seen = vit(encoder, image, context, patch=4, heads=2)
            seen = linear(seen, predictor, "enter") + self.positions[context]
            known = vit(self.teacher, image, patch=4, heads=2).detach()
            known = (known - known.mean(1, keepdim=True)) / (known.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            for target in targets:
                hidden = predictor["mask_token"] + self.positions[target]
                x = blocks(torch.cat([seen, hidden]), predictor, heads=2)[len(seen) :]
                difference = (linear(norm(x, predictor, "norm"), predictor, "leave") - known[target]).abs()
                terms.append(torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean())
        return sum(terms) / len(terms)

    def step(self, number, micro_batches):
        leaves = {name: value.detach().requires_grad_(name in self.trained) for name, value in self.weights.items()}
        losses = []
        for images in micro_batches:
            torch.manual_seed(len(self.losses) + len(losses))
            losses.append(self.loss(leaves, images))
        self.losses += [loss.item() for loss in losses]
        found = torch.autograd.grad(sum(losses) / len(losses), [leaves[name] for name in self.trained])
        gradients = dict(zip(self.trained, found, strict=True))
        lr = published_rate(number, self.warmup, self.planned, start=0.2 * self.lr, peak=self.lr, final=1e-6)
        decay = published_decay(number, self.planned, 0.04, 0.4)
        decays = {name: 0 if self.weights[name].ndim == 1 else decay for name in gradients}
        self.weights = self.optimizer.step(self.weights, gradients, lr, decays)
        momentum = 0.996 + number * (1 - 0.996) / self.planned
        for name, old in self.teacher.items():
            new = self.weights[f"backbone.masked.vit.{name}"].detach()
            self.teacher[name] = momentum * old + (1 - momentum) * new


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_the_reference(accumulate):
    """All schedules, the masks, the predictor, the normalized targets and the teacher; epochs of two steps."""
    module = make("IJEPA", lr=0.01, warmup_epochs=1, optimizer="adamw").double()
    batches = [make_views((16,), seed=seed) for seed in range(2 * accumulate)]
    program = Program(module, planned=4, warmup=2, lr=0.01)
    for number in range(4):
        step = number % 2
        program.step(number, [views[0] for views in batches[step * accumulate : (step + 1) * accumulate]])
    seeded = Seeded()
    run = fit(module, [[views] for views in batches], 2, [seeded], accumulate_grad_batches=accumulate)
    assert run.global_step == 4
    torch.testing.assert_close(seeded.losses, program.losses, **f64(CANCELLING))
    found = dict(module.named_parameters())
    for name, expected in program.weights.items():
        torch.testing.assert_close(found[name].detach(), expected.detach(), **f64(AMPLIFIED, size=1e-3))
    for name, expected in program.teacher.items():
        torch.testing.assert_close(found[f"momentum_backbone.masked.vit.{name}"], expected, **f64(AMPLIFIED, size=1e-3))


def masks_of(rows=slice(None)):
    """Masks of eight images, different for each of them."""
    generator = torch.Generator().manual_seed(2)
    order = torch.stack([torch.randperm(16, generator=generator) for _ in range(BATCH)])
    context, targets = order[:, :5].sort(1).values, order[:, 5:13].view(BATCH, 4, 2)
    return JepaMasks(context[rows], targets[rows], torch.zeros(BATCH, dtype=torch.bool)[rows])


def masked_gradients(rank, world_size):
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    module = make("IJEPA").double()
    module.mask_sampler = type("Fixed", (), {"grid": (4, 4), "__call__": lambda *_: masks_of(rows)})()
    views, _ = step_batch(CASE, torch.float64)
    run_step(module, [[views[0][rows]], None])["loss"].backward()
    gradients = {name: value.grad for name, value in module.named_parameters() if value.requires_grad}
    for gradient in gradients.values() if world_size > 1 else ():
        torch.distributed.all_reduce(gradient)
        gradient /= world_size
    return gradients


@pytest.mark.dist
def test_two_ranks_give_the_gradient_of_one_with_masks_of_their_own():
    alone = masked_gradients(0, 1)
    for gradients in run_processes(masked_gradients, 2, 2):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, alone[name], **f64(CANCELLING))


def test_the_encoder_sees_the_context_only_and_the_teacher_all():
    """Pixels of hidden patches change the loss through the targets alone."""
    module = make("IJEPA").eval()
    module.mask_sampler = type("Fixed", (), {"grid": (4, 4), "__call__": lambda *_: masks_of()})()
    images = torch.rand(BATCH, 3, 16, 16, requires_grad=True)
    seen, known = [], []
    module.backbone.vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    module.momentum_backbone.vit.blocks[0].register_forward_pre_hook(lambda _, args: known.append(args[0].shape))
    run_step(module, [[images], None])["loss"].backward()
    assert (seen, known) == ([(BATCH, 5, 16)], [(BATCH, 16, 16)])
    patches = F.unfold(images.grad, 4, stride=4).abs().sum(1)  # (B, 16)
    for patch, context in zip(patches, masks_of().context, strict=True):
        assert set(patch.nonzero().flatten().tolist()) == set(context.tolist())


def test_positions_are_fixed_in_both_encoders(tmp_path):
    expected = sincos_positions(16, (4, 4))
    module = make("IJEPA")
    trainer(tmp_path, CASE, epochs=1, limit_val_batches=0).fit(module, Data(BATCH))
    for encoder in (module.backbone, module.momentum_backbone):
        assert torch.equal(encoder.vit.pos_embed[0], expected)
        assert not encoder.vit.pos_embed.requires_grad
    learned = make("IJEPA", fixed_positions=False).backbone.vit.pos_embed
    assert learned.requires_grad
    assert not torch.equal(learned[0], expected)


def test_features_are_the_mean_of_the_patches():
    module = make("IJEPA").eval()
    images = torch.rand(3, 3, 16, 16)
    patches = module.backbone.tokens(images).patches
    torch.testing.assert_close(module(images), patches.mean(1))


@pytest.mark.slow
def test_paper_defaults(tmp_path):
    module = lc.IJEPA(tiny_patch_vit(), **(SMALL | {"warmup_epochs": 1}))
    run = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    run.fit(module, Data(BATCH))
    optimizer = run.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(1e-3 * BATCH / 2048)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.4)
    update = next(c for c in run.callbacks if isinstance(c, MomentumUpdate))
    assert (update.start, update.end, update.schedule) == (0.996, 1.0, "linear")
    big = lc.IJEPA("vit_tiny_patch16_224")
    sampler = big.mask_sampler
    assert (sampler.grid, sampler.targets, sampler.min_keep) == ((14, 14), 4, 10)
    assert (sampler.target_scale, sampler.target_aspect) == ((0.15, 0.2), (0.75, 1.5))
    assert sampler.context_scale == (0.85, 1.0)
    assert (len(big.predictor.blocks), big.predictor.enter.out_features) == (12, 384)
    assert big.predictor.blocks[0].attn.num_heads == 3
    assert (big.warmup_epochs, big.schedules.clip_grad) == (40, None)
    assert (big.weight_decay, big.schedules.final_weight_decay) == (0.04, 0.4)
    assert run.callback_metrics["train/target_std"] > 0
    assert -1 <= run.callback_metrics["train/agreement"] <= 1
    assert 0 <= run.callback_metrics["train/relaxed"] <= 1


def test_statistics_see_a_collapse():
    module, logged = make("IJEPA").eval(), {}
    module.log = lambda name, value, **kwargs: logged.__setitem__(name, torch.as_tensor(value).item())
    views, _ = step_batch(CASE)
    module.training_step([views, None], 0)
    assert logged["train/target_std"] > 0.05
    module.momentum_backbone.vit.norm.weight.data.zero_()
    module.momentum_backbone.vit.norm.bias.data.copy_(torch.randn(16))
    bias = module.momentum_backbone.vit.norm.bias
    module.predictor.leave.weight.data.zero_()
    module.predictor.leave.bias.data.copy_(bias - bias.mean())
    module.training_step([views, None], 0)
    assert logged["train/target_std"] == near(0, size=1)
    assert logged["train/agreement"] == near(1, size=1)


def test_relaxed_masks_are_counted():
    module, logged = make("IJEPA", norm=False), {}  # whose targets cover all that a context can be
    module.log = lambda name, value, **kwargs: logged.__setitem__(name, torch.as_tensor(value).item())
    module.training_step(step_batch(CASE), 0)
    assert logged["train/relaxed"] == 1.0


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_no_nan_for_extreme_features(scale):
    module = make("IJEPA")
    for network in (module.backbone, module.momentum_backbone):
        network.vit.norm.weight.data.mul_(scale)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run_step(module, step_batch(CASE))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)


def test_shapes_of_a_step_do_not_depend_on_the_image():
    """Only the draw decides: the same seed gives the same shapes for other images."""
    module, seen = make("IJEPA"), []
    module.predictor.register_forward_pre_hook(lambda _, args: seen.append([tuple(arg.shape) for arg in args]))
    for images in (torch.rand(4, 3, 16, 16), torch.zeros(4, 3, 16, 16)):
        torch.manual_seed(4)
        run_step(module, [[images], None])
    assert seen[0] == seen[1]


def test_backbones():
    named = lc.IJEPA("small_vit", backbone_kwargs={"embed_dim": 24, "depth": 1}, **SMALL, predictor_heads=2)
    assert named.backbone.vit.cls_token is None
    assert named.hparams["backbone_kwargs"] == {"embed_dim": 24, "depth": 1}
    assert named(torch.rand(2, 3, 32, 32)).shape == (2, 24)
    with pytest.raises(ValueError, match="`backbone` must average its patches, without class or register"):
        lc.IJEPA(tiny_vit(), **SMALL)
    with pytest.raises(ValueError, match="without a norm after the mean"):
        lc.IJEPA("small_vit", backbone_kwargs={"fc_norm": True}, **SMALL)
    with pytest.raises(TypeError, match="must be a vision transformer that can mask its patches"):
        lc.IJEPA(TinyBackbone())
    with pytest.raises(ValueError, match=r"got 'resnet18'\. Choose 'small_vit', or one of timm's \"vit_"):
        lc.IJEPA("resnet18")
    with pytest.raises(TypeError, match="got 'SmallConvNet'"):
        lc.IJEPA("small_convnet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_keep": 10}, "`min_keep` must be below the 9 patches"),
        ({"target_scale": (0.2, 0.15)}, "`target_scale` must be an ordered pair"),
        ({"context_scale": (1.0, 0.85)}, "`context_scale` must be an ordered pair"),
        ({"targets": 0}, "`targets` must be >= 1"),
        ({"momentum": -0.1}, r"`momentum` must lie in \[0, 1\]"),
        ({"predictor_dim": 15}, "`predictor_dim` must be a multiple of 4 and of its 2 heads, got 15"),
        ({"predictor_depth": 0}, "`predictor_depth` must be >= 1"),
        ({"predictor_heads": 0}, "`predictor_heads` must be >= 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lc.IJEPA(tiny_patch_vit(), **(SMALL | arguments))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 16), "`batch` must hold 1 views, got 2"),
        ((18,), "`images` must have sides that are multiples of"),
        ((32,), r"`images` must be 16 x 16 pixels for its masks, got \(32, 32\)\. Make such views, or build"),
    ],
)
def test_bad_views(sizes, message):
    with pytest.raises(ValueError, match=message):
        run_step(make("IJEPA"), [make_views(sizes, dtype=torch.float32), None])


def test_one_view_may_be_a_tensor_and_raw_images_name_the_callback():
    (view,), labels = step_batch(CASE)
    losses = [run_step(make("IJEPA"), [images, labels])["loss"] for images in (view, [view])]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match=r"Add `ViewAugmentation"):
        run_step(make("IJEPA"), [(255 * view).to(torch.uint8), labels])


def test_several_contexts_are_the_mean_over_each_alone():
    module, masks = make("IJEPA", contexts=2).eval(), masks_of()
    both = JepaMasks(torch.stack([masks.context, masks.context.flip(0)], dim=1), masks.targets, masks.relaxed)
    views, _ = step_batch(CASE)

    def step(contexts, drawn):
        module.contexts = contexts
        module.mask_sampler = type("Fixed", (), {"grid": (4, 4), "__call__": lambda *_: drawn})()
        return run_step(module, [views, None])

    together = step(2, both)
    alone = [step(1, JepaMasks(context, masks.targets, masks.relaxed)) for context in both.context.unbind(1)]
    assert together["loss"].item() == near(sum(output["loss"].item() for output in alone) / 2)
    torch.testing.assert_close(together["features"], alone[0]["features"])


def test_options_of_the_masks_reach_the_sampler():
    sampler = make("IJEPA", contexts=3, disjoint_targets=True).mask_sampler
    assert (sampler.contexts, sampler.disjoint_targets) == (3, True)
    assert sampler(2).context.shape[:2] == (2, 3)
