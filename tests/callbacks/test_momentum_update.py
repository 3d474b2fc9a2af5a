"""One update per real optimizer step, in every way a step can be made or skipped."""

import copy
import math
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_contrast.callbacks import MomentumUpdate
from tests.callbacks.step_modules import QUIET, Follow, Pair, fit, loader
from tests.tolerances import NETWORK, ROUNDED, f32


def check_average(module, oracle):
    for found, expected in zip(module.target.parameters(), oracle.average, strict=True):
        torch.testing.assert_close(found.double(), expected, **f32(ROUNDED))


# --- the schedule


def test_cosine_is_that_of_byol():
    update = MomentumUpdate(0.9, 1.0)
    for step in range(9):
        assert update.momentum_at(step, 8) == pytest.approx(1 - 0.1 * (math.cos(math.pi * step / 8) + 1) / 2)
    assert update.momentum_at(0, 8) == 0.9
    assert update.momentum_at(8, 8) == update.momentum_at(100, 8) == 1.0


def test_linear_and_constant():
    linear = MomentumUpdate(0.5, 0.9, "linear")
    assert [round(linear.momentum_at(k, 4), 12) for k in range(6)] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    assert MomentumUpdate(0.5, 0.9, "constant").momentum_at(3, math.inf) == 0.5


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_run_follows_the_schedule_and_the_formula(schedule):
    module, update = Pair(), MomentumUpdate(0.5, 1.0, schedule)
    oracle = Follow(lambda k: update.momentum_at(k, 8))
    fit(module, [update, oracle])
    assert oracle.count == update.updates == 8
    check_average(module, oracle)
    assert module.moments == pytest.approx([update.momentum_at(k, 8) for k in range(8)])


# --- what counts as a step


class SkippingPrecision(Precision):
    """A gradient scaler that skips given steps: the closure runs and the optimizer does not step."""

    def __init__(self, skipped):
        self.skipped, self.seen = skipped, 0

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        self.seen += 1
        if self.seen - 1 in self.skipped:
            return closure()
        return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)


class TwoOptimizers(Pair):
    """Manual optimization: both optimizers step in every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss)
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        return {"loss": loss.detach()}

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.online[0], self.online[2])]


class OneOptimizer(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.optimizers().step()
        self.optimizers().zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.online.parameters(), lr=0.1)


class ReturnsNone(Pair):
    """Steps 2 and 5 are given up, as people do for a loss that is not finite."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (2, 5) else super().training_step(batch, batch_idx)


class FusedScaled(Pair):
    """A real gradient scaler and a fused optimizer, which skips inside its own step; two batches overflow."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return {"loss": loss * float("inf") if batch_idx in (1, 4) else loss}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.online.parameters(), lr=0.1, fused=True)


class Scaled(FusedScaled):
    def configure_optimizers(self):
        return torch.optim.SGD(self.online.parameters(), lr=0.1)


def scaler():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))


CASES = {
    "plain": (Pair, {}, 8),
    "accumulate 3": (Pair, {"accumulate_grad_batches": 3}, 3),
    "two epochs": (Pair, {"max_epochs": 2}, 16),
    "skipping scaler": (Pair, {"plugins": [SkippingPrecision({1, 4})]}, 6),
    "real scaler": (Scaled, {"plugins": [scaler]}, 6),
    "real scaler, fused": (FusedScaled, {"plugins": [scaler]}, 6),
    "manual, two optimizers": (TwoOptimizers, {}, 4),
    "manual, one optimizer": (OneOptimizer, {}, 8),
    "None from training_step": (ReturnsNone, {}, 6),
    "None in an accumulation": (ReturnsNone, {"accumulate_grad_batches": 3}, 3),
    "bf16-mixed": (Pair, {"precision": "bf16-mixed"}, 8),
    "clipping": (Pair, {"gradient_clip_val": 0.1}, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_one_update_per_real_step(case):
    make, settings, expected = CASES[case]
    settings = copy.copy(settings)
    if "plugins" in settings:
        settings["plugins"] = [plugin() if callable(plugin) else plugin for plugin in settings["plugins"]]
    module, update = make(), MomentumUpdate(0.9, 0.9, "constant")
    oracle = Follow(lambda _: 0.9)
    fit(module, [update, oracle], **settings)
    assert update.updates == oracle.count == expected
    check_average(module, oracle)


def test_the_schedule_of_manual_optimization_follows_the_run():
    module, update = TwoOptimizers(), MomentumUpdate(0.0, 1.0, "linear")
    oracle = Follow(lambda k: (2 * k + 1) / 8)  # the updates come after batches 1, 3, 5, 7 of 8
    fit(module, [update, oracle])
    check_average(module, oracle)
    assert module.moments[1::2] == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8])


def test_the_schedule_of_manual_optimization_ends_with_max_steps():
    module, update = TwoOptimizers(), MomentumUpdate(0.0, 1.0, "linear")
    fit(module, [update], max_epochs=-1, max_steps=8)  # both optimizers count
    assert module.moments[1::2] == pytest.approx([0 / 8, 2 / 8, 4 / 8, 6 / 8])


# --- buffers, half precision


@pytest.mark.parametrize("rule", ["none", "copy", "ema"])
def test_buffers(rule):
    module, update = Pair(norm=True), MomentumUpdate(0.5, 0.5, buffers=rule)
    before = module.target[1].running_mean.clone()
    module.target.eval()
    fit(module, [update], limit_train_batches=1)
    new = module.online[1].running_mean
    assert not torch.equal(new, before)
    expected = {"none": before, "copy": new, "ema": (before + new) / 2}[rule]
    torch.testing.assert_close(module.target[1].running_mean, expected)
    assert module.target[1].num_batches_tracked == 1


class Half(Pair):
    """Weights in bfloat16, where a momentum of 0.999 alone would never move the target."""

    def __init__(self):
        super().__init__(lr=0.01)
        nn.init.ones_(self.target[0].weight)
        self.to(torch.bfloat16)

    def loss(self, batch):
        return super().loss([batch[0].to(torch.bfloat16)])


def test_half_precision_has_a_float32_master():
    module, update = Half(), MomentumUpdate(0.999, 0.999)
    oracle = Follow(lambda _: 0.999)
    fit(module, [update, oracle], max_epochs=25)
    masters = update.state_dict()["masters"]
    for (name, found), expected in zip(module.target.named_parameters(), oracle.average, strict=True):
        torch.testing.assert_close(masters[f"0.{name}"].double(), expected, **f32(NETWORK))
        assert torch.equal(found, masters[f"0.{name}"].bfloat16())
    assert (module.target[0].weight != 1).all()  # it moved


def test_the_master_resumes_exactly(tmp_path):
    def run(module, update, epochs, path=None):
        return fit(module, [update], max_epochs=epochs, ckpt_path=path)

    whole, first, second = Half(), Half(), Half()
    update = MomentumUpdate(0.999, 0.999)
    run(whole, update, 4)
    path = tmp_path / "half.ckpt"
    run(first, MomentumUpdate(0.999, 0.999), 2).save_checkpoint(path)
    resumed = MomentumUpdate(0.999, 0.999)
    run(second, resumed, 4, path)
    ours, theirs = update.state_dict(), resumed.state_dict()
    assert ours["updates"] == theirs["updates"] == 32
    assert all(torch.equal(theirs["masters"][name], value) for name, value in ours["masters"].items())


def test_a_master_that_no_longer_fits_the_weights_is_dropped():
    module, update = Half(), MomentumUpdate(0.999, 0.999)
    fit(module, [update])
    with torch.no_grad():
        module.target[0].weight.fill_(-3.0)
    fit(module, [update], limit_train_batches=1)
    assert update.state_dict()["masters"]["0.0.weight"] == pytest.approx(-3.0, abs=0.01)


# --- resume and second fits


class RandomAccessLoader(DataLoader):
    """A loader whose position can be saved, for checkpoints within an epoch."""

    position = 0

    def __iter__(self):
        batches = list(super().__iter__())
        start, self.position = self.position % len(batches), 0
        for number, batch in enumerate(batches[start:], start):
            self.position = number + 1
            yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("stop", [{"max_epochs": 2}, {"max_steps": 11, "max_epochs": 3}])
def test_resume_equals_the_uninterrupted_run(tmp_path, stop):
    def data():
        return RandomAccessLoader(loader().dataset, batch_size=4)

    class SaveAt(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == (16 if "max_steps" not in stop else 11):
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    whole, update = Pair(norm=True), MomentumUpdate(0.5, 1.0, buffers="ema")
    fit(whole, [update, SaveAt()], data(), max_epochs=3)
    other, resumed = Pair(norm=True), MomentumUpdate(0.5, 1.0, buffers="ema")
    nn.init.zeros_(other.target[0].weight)
    fit(other, [resumed], data(), max_epochs=3, ckpt_path=tmp_path / "stop.ckpt")
    assert resumed.updates == update.updates == 24
    ours, theirs = whole.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.load(tmp_path / "stop.ckpt", weights_only=True)


def test_a_longer_second_fit_goes_on_and_a_new_trainer_starts_anew():
    module, update = Pair(), MomentumUpdate(0.5, 1.0)
    trainer = fit(module, [update])
    trainer.fit_loop.max_epochs = 2
    fit(module, None, trainer=trainer)
    assert update.updates == 16
    assert module.moments[8] == pytest.approx(update.momentum_at(8, 16))
    fit(module, [update])
    assert update.updates == 8
    assert module.moments[16] == pytest.approx(0.5)


def test_an_optimizer_is_left_alone_after_the_run_and_after_an_error():
    class Fails(Pair):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    for make, error in ((Pair, None), (Fails, "stop")):
        module, update = make(), MomentumUpdate(0.9, 1.0)
        trainer = L.Trainer(callbacks=[update], max_epochs=1, **QUIET)
        if error:
            with pytest.raises(RuntimeError, match=error):
                fit(module, None, trainer=trainer)
        else:
            fit(module, None, trainer=trainer)
        assert not trainer.optimizers or not trainer.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_it_can_be_copied_during_a_fit(copied):
    class CopyNow(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.copy = copied(update)

    update, copies = MomentumUpdate(0.5, 0.9, "linear", "copy"), CopyNow()
    fit(Pair(), [update, copies])
    assert copies.copy.updates == 8
    assert (copies.copy.start, copies.copy.end, copies.copy.schedule, copies.copy.buffers) == (
        0.5,
        0.9,
        "linear",
        "copy",
    )
    fit(Pair(), [copies.copy])
    assert copies.copy.updates == 8


# --- states that move once per step


class Counter(nn.Module):
    """Records what is asked of it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def commit(self):
        self.calls.append("commit")

    def discard(self):
        self.calls.append("discard")


def with_states(make):
    class Stateful(make):
        def __init__(self):
            super().__init__()
            self.center = Counter()

        def step_states(self):
            return [self.center]

    return Stateful()


@pytest.mark.parametrize(
    ("make", "settings", "calls"),
    [
        (Pair, {}, "cccccccc"),
        (Pair, {"accumulate_grad_batches": 3}, "ccc"),
        (ReturnsNone, {}, "ccdccdcc"),
        (Pair, {"plugins": [SkippingPrecision({1, 4})]}, "cdccdccc"),
        (FusedScaled, {"plugins": [scaler()]}, "cdccdccc"),
        (TwoOptimizers, {}, "cccc"),
    ],
)
def test_states_are_committed_after_real_steps_and_discarded_after_skipped_ones(make, settings, calls):
    module = with_states(make)
    fit(module, [MomentumUpdate(0.9, 1.0)], **settings)
    assert "".join(call[0] for call in module.center.calls) == calls


def test_states_need_no_teacher():
    class Only(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.center = nn.Linear(6, 1), Counter()

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).mean()

        def step_states(self):
            return [self.center]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Only()
    trainer = fit(module, [MomentumUpdate()])
    assert module.center.calls == ["commit"] * 8
    assert "train/momentum" not in trainer.callback_metrics


# --- bad input


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(6)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"start": -0.1}, r"`start` must lie in \[0, 1\], got -0.1"),
        ({"start": 0.9, "end": 1.1}, r"`end` must lie in \[0, 1\], got 1.1"),
        ({"start": 0.9, "end": 0.5}, r"`end` must be at least `start` \(0.9\), got 0.5"),
        ({"schedule": "cosin"}, "`schedule` must be one of .* Did you mean 'cosine'"),
        ({"buffers": "all"}, "`buffers` must be one of 'none', 'copy', 'ema', got 'all'"),
    ],
)
def test_bad_arguments_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        MomentumUpdate(**kwargs)


def test_an_endless_run_needs_a_constant():
    words = "`schedule` must be \"constant\" in an endless run, got 'cosine'. Set `max_epochs` or `max_steps`"
    with pytest.raises(ValueError, match=words):
        fit(Pair(), [MomentumUpdate(0.9, 1.0)], max_epochs=-1)
    endless = DataLoader(Endless(), batch_size=4)
    with pytest.raises(ValueError, match=words):
        fit(Pair(), [MomentumUpdate(0.9, 1.0)], [endless], max_epochs=1)
    with pytest.raises(ValueError, match=words):
        fit(TwoOptimizers(), [MomentumUpdate(0.9, 1.0)], max_epochs=-1)

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = True

    for update in (MomentumUpdate(0.9, 1.0, "constant"), MomentumUpdate(0.9, 0.9)):
        fit(Pair(), [update, Stop()], max_epochs=-1)
        assert update.updates == 1
    update = MomentumUpdate(0.9, 1.0)
    fit(Pair(), [update], max_epochs=-1, max_steps=3)
    assert update.updates == 3


class NoPairs(L.LightningModule):
    pass


class EmptyPairs(Pair):
    def momentum_pairs(self):
        return []


class OtherWidth(Pair):
    def __init__(self):
        super().__init__()
        self.target[2] = nn.Linear(4, 2).requires_grad_(False)


class Itself(Pair):
    def momentum_pairs(self):
        return [(self.online, self.online)]


class Twice(Pair):
    def momentum_pairs(self):
        return [(self.online, self.target), (self.online[0], self.target[0])]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (NoPairs, TypeError, "`pl_module` must have a method `momentum_pairs`, got 'NoPairs'"),
        (EmptyPairs, ValueError, "`momentum_pairs` must return at least one pair"),
        (OtherWidth, ValueError, r"got '2.weight' of shape \(3, 4\) in the online and \(2, 4\)"),
        (Itself, ValueError, "is its own source"),
        (Twice, ValueError, "in two momentum modules"),
    ],
)
def test_bad_modules_are_refused_before_the_first_step(make, error, words):
    class Unreachable(make):
        def training_step(self, batch, batch_idx):
            raise AssertionError("a step was made")

        def configure_optimizers(self):
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    Unreachable.__name__ = make.__name__
    with pytest.raises(error, match=words):
        fit(Unreachable(), [MomentumUpdate(0.9, 1.0)])


def test_an_optimizer_whose_steps_cannot_be_seen_is_refused():
    from lightning_contrast.runtime.optimizer_steps import StepDetector

    with pytest.raises(TypeError, match=r"`optimizer` must be a torch\.optim\.Optimizer, got 'object'"):
        StepDetector().attach([object()])
