"""Chunked passes give the gradient of the whole batch."""

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn

from lightning_contrast.callbacks import GradientCache
from lightning_contrast.callbacks.gradient_cache import ChunkedForward
from tests.callbacks.step_modules import QUIET, fit, loader
from tests.callbacks.strategies import STRATEGIES, fit_ranks, sharded
from tests.launch import run_processes
from tests.methods.cases import CASES, make
from tests.methods.test_contract import run_step, step_batch
from tests.tolerances import CANCELLING, FORMULA, NETWORK, bound, f32, f64


class Contrast(L.LightningModule):
    """A contrastive loss over the whole batch, so that chunks cannot be treated as batches."""

    def __init__(self, layer=None, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        middle = layer() if layer else nn.Tanh()
        self.backbone = nn.Sequential(nn.Linear(6, 8), middle, nn.Linear(8, 4))
        self.projector, self.lr = nn.Sequential(nn.Linear(4, 3)), 0.1
        self.calls, self.gradients, self.rows = 0, [], []
        self.backbone[0].register_forward_hook(self.count)

    def count(self, module, args, output):
        self.calls += 1
        self.rows.append(len(output))

    def training_step(self, batch, batch_idx):
        x = batch[0]
        z = nn.functional.normalize(self.projector(self.backbone(torch.cat([x, x + 0.1]))), dim=1)
        a, b = z.float().chunk(2)
        loss = nn.functional.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))
        return {"loss": loss, "features": z.detach()}

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)  # every batch meets the same weights


def gradients(callbacks, make=Contrast, **kwargs):
    module = make()
    torch.manual_seed(1)
    fit(module, callbacks, loader(batches=4, rows=8), **kwargs)
    return module


def distance(ours, theirs):
    pairs = [
        (a, b) for one, two in zip(ours.gradients, theirs.gradients, strict=True) for a, b in zip(one, two, strict=True)
    ]
    return max(((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in pairs)


@pytest.mark.parametrize("size", [1, 3, 4, 16, 100])
def test_the_gradient_is_that_of_the_whole_batch(size):
    cached, plain = gradients([GradientCache(size)]), gradients([])
    assert distance(cached, plain) < bound(FORMULA)
    chunks = -(-16 // size)
    assert cached.calls == (4 * 2 * chunks if chunks > 1 else 4)  # once forward and once again, in each of 4 batches
    assert max(cached.rows) == min(size, 16)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.01}])
def test_accumulation_and_clipping(settings):
    assert distance(gradients([GradientCache(3)], **settings), gradients([], **settings)) < bound(FORMULA)


def test_bf16_within_its_rounding():
    settings = {"precision": "bf16-mixed", "limit_train_batches": 1}
    cached, plain = gradients([GradientCache(4)], **settings), gradients([], **settings)
    assert distance(cached, gradients([], limit_train_batches=1)) > 0
    assert distance(cached, plain) < 2e-2


def test_float64_to_the_last_digits():
    settings = {"precision": "64-true"}
    assert distance(gradients([GradientCache(4)], **settings), gradients([], **settings)) < bound(
        NETWORK, torch.float64
    )


class Recorder(nn.Dropout):
    """Dropout that keeps its masks."""

    masks: list

    def forward(self, x):
        out = super().forward(torch.ones_like(x))
        self.__class__.masks.append(out)
        return x * out


def test_dropout_masks_are_repeated():
    Recorder.masks = []
    cached = gradients([GradientCache(4)], lambda: Contrast(lambda: Recorder(0.5)), limit_train_batches=1)
    masks = Recorder.masks
    assert len(masks) == 8
    first, again = masks[:4], masks[4:]
    # The backward pass meets the chunks in any order; each mask occurs twice.
    assert all(sum(torch.equal(mask, other) for other in again) == 1 for mask in first)
    whole = torch.cat(first)

    class Replay(nn.Module):
        def forward(self, x):
            return x * whole

    plain = gradients([], lambda: Contrast(Replay), limit_train_batches=1)
    assert distance(cached, plain) < bound(FORMULA)


def test_batchnorm_sees_chunks_and_moves_its_averages_once_a_chunk():
    cached = gradients([GradientCache(4)], lambda: Contrast(lambda: nn.BatchNorm1d(8)), limit_train_batches=1)
    # The oracle: four passes of four rows each, joined before the loss, in one ordinary graph.
    oracle = Contrast(lambda: nn.BatchNorm1d(8))
    whole = oracle.backbone
    x = next(iter(loader(batches=4, rows=8)))[0]
    outputs = torch.cat([whole(chunk) for chunk in torch.cat([x, x + 0.1]).split(4)])
    a, b = nn.functional.normalize(oracle.projector(outputs), dim=1).chunk(2)
    nn.functional.cross_entropy(a @ b.T / 0.2, torch.arange(8)).backward()
    norm, expected = cached.backbone[1], oracle.backbone[1]
    assert norm.num_batches_tracked == 4
    torch.testing.assert_close(norm.running_mean, expected.running_mean)
    torch.testing.assert_close(norm.running_var, expected.running_var)
    for found, parameter in zip(cached.gradients[0], oracle.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, **f32(FORMULA, size=0.01))


def test_evaluation_and_passes_without_gradient_run_whole():
    class Validates(Contrast):
        def validation_step(self, batch, batch_idx):
            self.rows.clear()
            self.backbone(batch[0])
            assert self.rows == [8]

        def val_dataloader(self):
            return loader(batches=1, rows=8)

    fit(Validates(), [GradientCache(3)], loader(batches=4, rows=8))


def test_forward_hooks_fire_once_with_the_whole_batch():
    sizes = []

    class Hook(L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.backbone.register_forward_hook(lambda m, args, out: sizes.append(len(out)))

    gradients([GradientCache(3), Hook()])
    assert sizes == [16] * 4


def test_nested_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, scale=1.0):
            return {"features": self.layer(x) * scale, "tokens": (x, [x[:, :1]])}

    module, x = Two(), torch.randn(7, 3)
    expected = module(x, scale=2.0)
    found = ChunkedForward(module, 3)(x, scale=2.0)
    torch.testing.assert_close(found, expected)
    assert isinstance(found["tokens"], tuple)


# --- it leaves no trace


class Boom(Contrast):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("boom")


def test_forward_is_put_back_after_a_fit_and_after_an_error():
    module = gradients([GradientCache(3)])
    assert "forward" not in module.backbone.__dict__
    module = Boom()
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, [GradientCache(3)])
    assert "forward" not in module.backbone.__dict__


def test_a_forward_of_the_instance_is_used_and_put_back():
    module = Contrast()
    own = module.backbone.forward
    module.backbone.forward = lambda x: own(x) * 2
    kept = module.backbone.forward
    plain = Contrast()
    plain.backbone.forward = lambda x: type(plain.backbone).forward(plain.backbone, x) * 2
    fit(module, [GradientCache(3)], loader(batches=4, rows=8))
    fit(plain, [], loader(batches=4, rows=8))
    assert module.backbone.__dict__["forward"] is kept
    assert distance(module, plain) < bound(FORMULA)


def test_a_second_fit_and_two_caches():
    module, caches = Contrast(), [GradientCache(3), GradientCache(5, "projector")]
    trainer = L.Trainer(callbacks=caches, max_epochs=1, **QUIET)
    fit(module, None, loader(batches=4, rows=8), trainer=trainer)
    trainer.fit_loop.max_epochs = 2
    fit(module, None, loader(batches=4, rows=8), trainer=trainer)
    plain = gradients([], max_epochs=2)
    assert distance(module, plain) < bound(FORMULA)
    assert "forward" not in module.projector.__dict__


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_the_module_can_be_copied_during_the_fit(copied):
    class Copy(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.copy = copied(pl_module.backbone)
            with torch.no_grad():
                pl_module.backbone[0].weight.zero_()

    copies = Copy()
    gradients([GradientCache(3), copies])
    x = torch.randn(5, 6)
    reference = Contrast().backbone
    torch.testing.assert_close(copies.copy(x), reference(x))  # its own weights, not those of the original


# --- bad input


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_chunk_sizes_are_refused(size, error):
    with pytest.raises(error, match="`chunk_size` must be"):
        GradientCache(size)


def test_an_unknown_module_names_the_near_ones():
    with pytest.raises(ValueError, match=r"`module` must be one of.*got 'backbon'\. Did you mean 'backbone'"):
        fit(Contrast(), [GradientCache(3, "backbon")])


@pytest.mark.parametrize(
    ("forward", "args", "words"),
    [
        (lambda self, x, y: x, (torch.ones(4, 2), torch.ones(4, 2)), "take one tensor, as its first argument"),
        (lambda self, x: x[0], ([torch.ones(4, 2)],), "take one tensor, as its first argument"),
        (lambda self, x: x.sum(), (torch.ones(4, 2),), r"return tensors of 3 rows for 3 images, got \(\)"),
        (lambda self, x: x.T, (torch.ones(4, 2),), r"return tensors of 3 rows for 3 images, got \(2, 3\)"),
        (lambda self, x: (x, "name"), (torch.ones(4, 2),), "got 'str'"),
    ],
)
def test_modules_that_cannot_be_chunked_are_refused(forward, args, words):
    kind = type("Kind", (nn.Module,), {"forward": forward})
    with pytest.raises(TypeError, match=words):
        ChunkedForward(kind(), 3)(*args)


# --- several ranks


class Ranked(sharded(Contrast)):
    """Its weights after training stand for its gradients."""

    def on_before_optimizer_step(self, optimizer):
        pass


def ranked(rank, name, size):
    from tests.callbacks.strategies import TakeWeights

    module, weights = Ranked(), TakeWeights()
    callbacks = [weights] + ([GradientCache(size)] if size else [])
    fit_ranks(module, callbacks, loader(batches=8, rows=8), name)
    return weights.history[-1], module.rows


@pytest.mark.dist
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_trains_as_without_it(name):
    plain = run_processes(ranked, 2, name, None, init=False)
    cached = run_processes(ranked, 2, name, 3, init=False)
    for (ours, rows), (theirs, _) in zip(cached, plain, strict=True):
        assert max(rows) == 3
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, **f32(FORMULA, size=0.1))


@pytest.mark.parametrize("name", ["DINO", "IBOT", "DINOv2", "MSN", "IJEPA"])
def test_no_method_runs_more_than_a_chunk_with_gradient(name):
    """Masked vision transformers are called by `tokens`, with masks or kept patches; the gradient stays the same."""

    def step(cached):
        module, batch, most = make(name, norm=False).double(), step_batch(CASES[name], torch.float64), [0]
        first = next(m for m in module.backbone.modules() if isinstance(m, nn.Conv2d))
        first.register_forward_hook(lambda m, args, out: most.append(len(out) if torch.is_grad_enabled() else 0))
        cache = GradientCache(3)
        if cached:
            cache.on_fit_start(None, module)
        torch.manual_seed(0)
        run_step(module, batch)["loss"].backward()
        cache.teardown(None, module, "fit")
        assert not {"forward", "tokens"} & set(vars(module.backbone))
        return max(most), {key: p.grad for key, p in module.named_parameters() if p.grad is not None}

    (whole, expected), (most, found) = step(False), step(True)
    assert most <= 3 < whole
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, **f64(CANCELLING, size=0.01))
