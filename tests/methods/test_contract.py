"""What every method promises, whatever its algorithm: each new method joins by one line in cases.py."""

import copy
import pickle
from contextlib import nullcontext

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import nn

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate, QueueUpdate, StepSeed
from tests.launch import run_processes
from tests.methods.cases import CASES, Case, fill_queue, make
from tests.tolerances import CANCELLING, f64

BATCH, BATCHES, PIXELS = 8, 4, 16
methods = pytest.mark.parametrize("name", CASES)


class Policy(nn.Module):
    """Cheap random views: noise and a flip, drawn from torch's global generator as Kornia's are."""

    size, mean, std = PIXELS, None, None
    input_spec = {"size": PIXELS, "mean": None, "std": None}  # noqa: RUF012

    def __init__(self, views):
        super().__init__()
        self.views = views

    def forward(self, images):
        return [self.eval_transform(images) + 0.2 * torch.randn(images.shape) for _ in range(self.views)]

    def eval_transform(self, images):
        return images.float() / 255


class Data(lc.data.EmojiDataModule):
    """A few small emoji."""

    def read(self, split):
        images, labels = super().read(split)
        return images[: BATCH * BATCHES, :, ::2, ::2].contiguous(), labels[: BATCH * BATCHES]


def data(name):
    return Data(BATCH, indices=CASES[name].indices)


def trainer(tmp_path, case, *, callbacks=(), epochs=2, **kwargs):
    settings = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
    }
    views = lc.ViewAugmentation(Policy(case.views), seed=3)
    return L.Trainer(**(settings | kwargs), callbacks=[views, StepSeed(3), *callbacks])


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def step_batch(case: Case, dtype=torch.float32, size=BATCH, seed=5):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.rand(size, 3, PIXELS, PIXELS, generator=generator, dtype=dtype) for _ in range(case.views)]
    labels = torch.arange(size) % 3
    return [views, labels, torch.arange(size) * 3] if case.indices else [views, labels]


def rows_of(batch, rows):
    views, *rest = batch
    return [[view[rows] for view in views], *(item[rows] for item in rest)]


def run_step(module, batch):
    """Run a training step outside a Trainer."""
    module.log = lambda *a, **k: None
    return module.training_step(batch, 0)


@methods
@pytest.mark.matrix("fit")
def test_every_trainable_parameter_gets_a_gradient_and_no_other(name):
    module = fill_queue(make(name))
    run_step(module, step_batch(CASES[name]))["loss"].backward()
    for parameter_name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    assert not list(module.parameters(recurse=False)), "parameters belong in submodules"


@methods
@pytest.mark.matrix("fit")
def test_step_output(name):
    module = make(name)
    out = run_step(module, step_batch(CASES[name]))
    assert out["loss"].ndim == 0
    assert out["features"].shape == (BATCH, module.feature_dim)
    assert not out["features"].requires_grad
    assert module(torch.rand(6, 3, PIXELS, PIXELS)).shape == (6, module.feature_dim)


@methods
def test_momentum_modules_start_equal_and_frozen(name):
    module = make(name)
    pairs = module.momentum_pairs() if hasattr(module, "momentum_pairs") else []
    for online, momentum in pairs:
        assert_equal_states(state(online), state(momentum))
        assert not any(parameter.requires_grad for parameter in momentum.parameters())
    moved = {parameter for _, momentum in pairs for parameter in momentum.parameters()}
    for child, network in module.named_children():
        assert not child.startswith("momentum_") or moved.issuperset(network.parameters()), child


class Watch(L.Callback):
    """Compares queues and momentum modules around each step, before the module's own callbacks act at its end."""

    def __init__(self):
        self.seen = []

    def held(self, module):
        queues = module.queues().values() if hasattr(module, "queues") else []
        pairs = module.momentum_pairs() if hasattr(module, "momentum_pairs") else []
        return [state(queue) for queue in queues], [weights(momentum) for _, momentum in pairs]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = self.held(pl_module)
        self.seen.append(self.before)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for old, new in zip(self.before, self.held(pl_module), strict=True):
            for a, b in zip(old, new, strict=True):
                assert_equal_states(a, b)  # a key is never in the queue of its own step


def weights(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


stateful = pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.stateful])


@stateful
def test_only_the_plug_ins_change_queues_and_momentum_networks_and_they_do(name, tmp_path):
    module, watch = make(name), Watch()
    trainer(tmp_path, CASES[name], epochs=1, callbacks=[watch], limit_val_batches=0).fit(module, data(name))
    for kind, after in zip(watch.seen[0], watch.held(module), strict=True):
        for a, b in zip(kind, after, strict=True):
            assert any(not torch.equal(a[key], b[key]) for key in a)


@stateful
def test_a_users_plug_in_wins(name, tmp_path):
    class Never(MomentumUpdate):
        pass

    module = make(name)
    own = [kind(*start) for kind, start in ((Never, (1.0, 1.0)), (QueueUpdate, ())) if needs(module, kind)]
    fit = trainer(tmp_path, CASES[name], epochs=1, callbacks=own, limit_val_batches=0)
    before = [weights(momentum) for _, momentum in pairs_of(module)]
    says = pytest.warns(UserWarning, match=r"given start=1\.0 \(not 0\.\d+\).*takes precedence over the momentum of")
    with says if needs(module, Never) else nullcontext():
        fit.fit(module, data(name))
    assert [c for c in fit.callbacks if isinstance(c, MomentumUpdate | QueueUpdate)] == own
    for old, (_, momentum) in zip(before, pairs_of(module), strict=True):
        assert_equal_states(old, weights(momentum))


def pairs_of(module):
    return module.momentum_pairs() if hasattr(module, "momentum_pairs") else []


def needs(module, kind):
    if issubclass(kind, MomentumUpdate):
        return bool(pairs_of(module))
    return hasattr(module, "queues") and bool(module.queues())


@methods
@pytest.mark.matrix("fit")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_optimizer_holds_exactly_the_trainable_parameters(name, optimizer, tmp_path):
    module = make(name, optimizer=optimizer)
    trainer(tmp_path, CASES[name], epochs=1, limit_train_batches=1, limit_val_batches=0).fit(module, data(name))
    groups = module.trainer.optimizers[0].param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    for group in groups:
        assert all(p.ndim > 1 for p in group["params"]) or group["weight_decay"] == 0


@methods
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "stop", [pytest.param(stop, marks=pytest.mark.matrix(f"resume, {stop}")) for stop in ("epoch end", "mid-epoch")]
)
def test_resume_equals_the_uninterrupted_run(name, stop, tmp_path):
    case, stopped_at = CASES[name], BATCHES if stop == "epoch end" else BATCHES + 2

    def fit(module, folder, **kwargs):
        every = {"every_n_epochs": 1} if stop == "epoch end" else {"every_n_train_steps": BATCHES + 2}
        saved = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, **every)
        run = trainer(tmp_path, case, callbacks=[lc.OnlineLinearProbe(num_classes=9), saved], epochs=3)
        run.fit(module, data(name), **kwargs)
        return run

    whole = make(name)
    full = fit(whole, "whole")
    path = tmp_path / "whole" / f"step={stopped_at}.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == stopped_at

    torch.manual_seed(99)
    resumed = make(name)
    for parameter in resumed.parameters():
        parameter.data.add_(1.0)  # what is not loaded shows
    second = fit(resumed, "resumed", ckpt_path=path, weights_only=True)
    assert_equal_states(state(whole), state(resumed))
    assert second.global_step == full.global_step == 3 * BATCHES
    for a, b in zip(full.optimizers[0].state.values(), second.optimizers[0].state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
    assert (
        full.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"]
        == (second.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"])
    )
    probes = [next(c for c in t.callbacks if isinstance(c, lc.OnlineLinearProbe)) for t in (full, second)]
    a, b = (flat(p.state_dict()) for p in probes)
    assert a.keys() == b.keys()
    assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


def flat(value, prefix=""):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{prefix}/{i}").items()}
    return {} if value is None or isinstance(value, str) else {prefix: value}


@methods
@pytest.mark.matrix("checkpoint")
def test_checkpoint_loads_with_weights_only_and_without_modules_in_it(name, tmp_path):
    module = make(name)
    fit = trainer(tmp_path, CASES[name], epochs=1)
    fit.fit(module, data(name))
    fit.save_checkpoint(tmp_path / "one.ckpt")
    loaded = torch.load(tmp_path / "one.ckpt", weights_only=True)
    argument = CASES[name].argument
    assert f"pass `{argument}` to `load_from_checkpoint`" in loaded["hyper_parameters"][argument]
    assert loaded["hyper_parameters"]["lr"] == 0.05
    again = type(module).load_from_checkpoint(
        tmp_path / "one.ckpt", **{argument: CASES[name].backbone(True)}, weights_only=True
    )
    assert_equal_states(state(module), state(again))


@methods
@pytest.mark.matrix("second fit")
def test_a_second_fit_goes_on_whether_or_not_there_was_a_validation(name, tmp_path):
    def fit_twice(between):
        module = make(name)
        fit = trainer(tmp_path, CASES[name], epochs=1, limit_val_batches=1)
        fit.fit(module, data(name))
        first = state(module)
        if between:
            fit.validate(module, data(name), verbose=False)
        fit.fit_loop.max_epochs = 2
        fit.fit(module, data(name))
        fit.validate(module, data(name), verbose=False)
        assert fit.global_step == 2 * BATCHES
        assert any(not torch.equal(first[key], value) for key, value in state(module).items())
        return state(module)

    assert_equal_states(fit_twice(True), fit_twice(False))


@methods
@pytest.mark.matrix("bf16-mixed")
def test_bf16_and_accumulation(name, tmp_path):
    module, losses = make(name), []
    before = state(module)
    see = LambdaCallback(on_train_batch_end=lambda trainer, module, outputs, *_: losses.append(outputs["loss"]))
    settings = {"precision": "bf16-mixed", "accumulate_grad_batches": 2}
    fit = trainer(tmp_path, CASES[name], epochs=1, callbacks=[see], **settings)
    fit.fit(module, data(name))
    assert fit.global_step == BATCHES // 2
    assert torch.stack(losses).isfinite().all()
    assert {loss.dtype for loss in losses} == {torch.float32}
    after = state(module)
    assert all(value.dtype == after[key].dtype for key, value in before.items())
    assert any(not torch.equal(before[key], value) for key, value in after.items())


@methods
@pytest.mark.matrix("copied")
def test_copies_after_a_fit_are_the_same_and_train_on(name, tmp_path):
    module = make(name)
    trainer(tmp_path, CASES[name], epochs=1, limit_val_batches=0).fit(module, data(name))
    module.trainer = None
    copies = [copy.deepcopy(module)]
    if CASES[name].make.__name__ != "<lambda>":
        copies.append(pickle.loads(pickle.dumps(module)))
    for one in copies:
        assert_equal_states(state(module), state(one))
    for one in (module, *copies):
        trainer(tmp_path, CASES[name], epochs=1, limit_val_batches=0, limit_train_batches=2).fit(one, data(name))
        assert_equal_states(state(module), state(one))


def gradients(module, batch):
    run_step(module, batch)["loss"].backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def rank_gradients(rank, name, world_size):
    module = fill_queue(make(name, norm=False).double())
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    grads = gradients(module, rows_of(step_batch(CASES[name], torch.float64), rows))
    for gradient in grads.values():  # what DDP does
        torch.distributed.all_reduce(gradient)
        gradient /= world_size
    return grads


@methods
@pytest.mark.matrix("DDP")
@pytest.mark.dist
def test_two_ranks_give_the_gradient_of_one(name):
    module = fill_queue(make(name, norm=False).double())
    alone = gradients(module, step_batch(CASES[name], torch.float64))
    for grads in run_processes(rank_gradients, 2, name, 2):
        assert grads.keys() == alone.keys()
        for key, gradient in grads.items():
            torch.testing.assert_close(gradient, alone[key], **f64(CANCELLING))


def as_is(batch):
    return batch
