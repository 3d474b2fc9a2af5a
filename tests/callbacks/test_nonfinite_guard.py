"""A step with values that are not finite changes nothing but the counters.

The oracle is a run whose `training_step` returns None for the batches of the skipped steps: Lightning then steps the
optimizer without gradients, and moves its counters and schedules as after a step that a gradient scaler skips.
"""

import math
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate, NonFiniteGuard, QueueUpdate
from lightning_contrast.testing import HostSyncs, assert_callback_changes_nothing, run_processes
from tests.callbacks.step_modules import QUIET, Pair, fit, states_equal
from tests.methods.cases import make

ROWS = 4


def as_is(batch):
    return batch


def loader(batches):
    return DataLoader(batches, batch_size=None, collate_fn=as_is)


def rows(count, bad=()):
    """Batches of which those that are named hold a NaN."""
    batches = [(torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(n)),) for n in range(count)]
    for index in bad:
        batches[index][0][1, 2] = math.nan
    return batches


def without(batches, left_out):
    return [batch for index, batch in enumerate(batches) if index not in left_out]


def leaving_out(module, batches):
    """Make the module's training step return None for the batches of these indices."""
    step = module.training_step

    def training_step(batch, batch_idx):
        return None if batch_idx in batches else step(batch, batch_idx)

    module.training_step = training_step
    return module


class Scheduled(Pair):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def constant():
    return MomentumUpdate(0.9, schedule="constant")


def everything(module, trainer):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for index, entry in enumerate(trainer.optimizers[0].state.values()):
        state |= {f"{key} {index}": torch.as_tensor(value).clone() for key, value in entry.items() if value is not None}
    state["lr"] = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"], dtype=torch.float64)
    state["global_step"] = torch.tensor(trainer.global_step)
    return state


@pytest.mark.parametrize("guard_first", [True, False])
@pytest.mark.parametrize(
    ("count", "bad", "left_out", "accumulate"),
    [(5, [1], [1], 1), (5, [0, 3], [0, 3], 1), (6, [2], [2, 3], 2), (6, [3], [2, 3], 2), (5, [4], [4], 2)],
    ids=["one", "first and another", "first micro-batch", "second micro-batch", "odd last"],
)
def test_a_skipped_step_changes_nothing_but_the_counters(count, bad, left_out, accumulate, guard_first):
    batches = rows(count, bad)
    settings = {"accumulate_grad_batches": accumulate}
    guard, update, plain = NonFiniteGuard(), constant(), leaving_out(Scheduled(norm=True), left_out)
    callbacks = [guard, update] if guard_first else [update, guard]
    guarded = Scheduled(norm=True)
    with_guard = fit(guarded, callbacks, loader(batches), **settings)
    expected = fit(plain, [constant()], loader(rows(count)), **settings)
    steps = math.ceil(count / accumulate)
    assert guard.skipped == len(bad)
    assert states_equal(everything(plain, expected), everything(guarded, with_guard))
    assert (with_guard.global_step, update.updates) == (steps, steps - len(bad))
    assert with_guard.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**steps)
    assert int(with_guard.callback_metrics["train/skipped_steps"]) == len(bad)


class Snapshots(L.Callback):
    """Keeps what the run has learned before each batch, and the counters."""

    def __init__(self):
        self.states, self.counters = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        state = everything(pl_module, trainer)
        self.counters.append((int(state.pop("global_step")), float(state.pop("lr"))))
        self.states.append(state)


def test_a_skipped_step_leaves_weights_optimizer_teacher_and_statistics():
    snapshots, module = Snapshots(), Scheduled(norm=True)
    fit(module, [NonFiniteGuard(), constant(), snapshots], loader(rows(4, [2])))
    before, after = snapshots.states[2:]
    assert states_equal(before, after)
    first = snapshots.states[1]  # the step before has changed all of these
    for name in ("online.0.weight", "target.0.weight", "online.1.running_mean", "momentum_buffer 0"):
        assert not torch.equal(first[name], before[name]), name
    assert snapshots.counters == [(n, pytest.approx(0.1 * 0.9**n)) for n in range(4)]


def test_without_the_guard_everything_is_poisoned():
    module = Scheduled(norm=True)
    fit(module, [constant()], loader(rows(3, [1])))
    floats = [value for value in module.state_dict().values() if value.is_floating_point()]
    assert not any(value.isfinite().all() for value in floats)


class BadGradient(Pair):
    """At one step the loss is finite and its gradient is not: the square root of 0."""

    bad_at = 2

    def loss(self, batch):
        loss = super().loss(batch)
        if self.trainer.fit_loop.total_batch_idx == self.bad_at:
            loss = loss + (self.online[0].bias * 0).square().sum().sqrt()
        return loss


def test_a_bad_gradient_of_a_finite_loss_is_found_and_named():
    guard, module = NonFiniteGuard(), BadGradient()
    with pytest.warns(RuntimeWarning, match=r"epoch 0, batch 2\): the first is NaN in the gradient of `online.0.bias`"):
        quiet_fit(module, [guard, constant()], rows(4))
    plain = leaving_out(Pair(), [2])
    fit(plain, [constant()], loader(rows(4)))
    assert states_equal(plain.state_dict(), module.state_dict())


def quiet_fit(module, callbacks, batches, **kwargs):
    """Fit without hiding the guard's warning."""
    trainer = L.Trainer(callbacks=callbacks, **({"max_epochs": 1, "log_every_n_steps": 1} | QUIET | kwargs))
    warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
    trainer.fit(module, loader(batches))
    return trainer


@pytest.mark.parametrize(
    ("accumulate", "words"),
    [
        (1, r"after step 3 \(epoch 0, batch 3\): the first is NaN in `batch\[0\]`"),
        (2, r"after step 1 \(epoch 0, batch 3"),
    ],
)
def test_raise_names_batch_step_and_tensor(accumulate, words):
    module = Pair()
    with pytest.raises(FloatingPointError, match=words):
        fit(module, [NonFiniteGuard("raise"), constant()], loader(rows(5, [3])), accumulate_grad_batches=accumulate)
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_the_loss_of_an_earlier_micro_batch_is_named():
    with pytest.raises(FloatingPointError, match=r"\(epoch 0, batch 2\): the first is the loss"):
        fit(Pair(), [NonFiniteGuard("raise")], loader(rows(4, [2])), accumulate_grad_batches=2)


def test_bad_weights_raise_even_where_steps_are_skipped():
    module = Pair()
    with torch.no_grad():
        module.online[2].weight[0, 0] = math.inf
    with pytest.raises(
        FloatingPointError, match=r"infinity in the weights `online.2.weight`.* resume from an earlier checkpoint"
    ):
        fit(module, [NonFiniteGuard()], loader(rows(2)))


def test_too_many_in_a_row_raise():
    guard = NonFiniteGuard(max_in_a_row=3)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row were not finite"):
        fit(Pair(), [guard], loader(rows(8, [0, 1, 3, 4, 5])))
    assert guard.skipped == 4  # two, a sound step, two, and the third in a row


def views(count, per_batch, bad=(), indices=False):
    batches = []
    for n in range(count):
        generator = torch.Generator().manual_seed(n)
        images = [torch.rand(ROWS, 3, 16, 16, generator=generator) for _ in range(per_batch)]
        if n in bad:
            images[0][1, 0, 3, 3] = math.nan
        batches.append([images, torch.arange(ROWS), torch.arange(ROWS) + n])
    return batches


def method_fit(name, batches, callbacks, left_out=()):
    module = leaving_out(make(name), left_out)
    settings = {"max_steps": 5, "max_epochs": -1, "limit_val_batches": 0}
    return module, fit(module, callbacks, loader(batches), **settings)


@pytest.mark.parametrize(("name", "per_batch"), [("MoCo", 2), ("DINO", 4), ("BYOL", 2), ("NPID", 1)])
def test_methods_keep_teachers_queues_and_centers(name, per_batch):
    guard = NonFiniteGuard()
    expected = everything(*method_fit(name, views(5, per_batch), [], left_out=[2]))
    found = everything(*method_fit(name, views(5, per_batch, bad=[2]), [guard]))
    assert guard.skipped == 1
    assert states_equal(expected, found)


class OnOneRank(Pair):
    """The loss of rank 1 is infinite at one batch; its data are sound."""

    def loss(self, batch):
        loss = super().loss(batch)
        bad = self.global_rank == 1 and self.trainer.fit_loop.total_batch_idx == 1
        return loss + math.inf if bad else loss


def ddp(rank, bad):
    module = (OnOneRank if bad else Pair)(norm=True)
    batches = [(batch[0] + rank,) for batch in rows(4)]
    batches = batches if bad else without(batches, [1])  # Lightning refuses a step that returns None on several ranks
    guard = NonFiniteGuard()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = L.Trainer(
            callbacks=[guard, constant()],
            max_epochs=1,
            devices=2,
            strategy="ddp",
            use_distributed_sampler=False,
            **QUIET,
        )
        trainer.fit(module, loader(batches))
    texts = [str(entry.message) for entry in caught if "not finite" in str(entry.message)]
    return everything(module, trainer), guard.skipped, texts


@pytest.mark.dist
def test_all_ranks_skip_what_is_bad_on_one():
    expected = run_processes(ddp, 2, False, init=False)
    found = run_processes(ddp, 2, True, init=False)
    for (sound, _, _), (state, skipped, _) in zip(expected, found, strict=True):
        assert skipped == 1
        assert (sound.pop("global_step"), state.pop("global_step")) == (3, 4)
        assert states_equal(sound, state)
    assert "batch 1) on rank 1: the first is the loss" in found[0][2][0]  # the message of rank 0 names rank 1
    assert not found[1][2]


class Manual(Pair):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization():
    batches, guard, update = rows(5, [1]), NonFiniteGuard(), constant()
    module, plain = Manual(), Manual()
    trainer = fit(module, [guard, update], loader(batches))
    fit(plain, [constant()], loader(without(batches, [1])))
    assert (guard.skipped, trainer.global_step, update.updates) == (1, 5, 4)
    assert states_equal(plain.state_dict(), module.state_dict())


def scaled_fit(module, guard, batches):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    return fit(module, [guard, constant()], loader(batches), plugins=[plugin]), scaler


def test_infinite_gradients_are_left_to_a_gradient_scaler():
    """The guard checks the loss only."""
    guard, module = NonFiniteGuard("raise"), BadGradient()
    _, scaler = scaled_fit(module, guard, rows(4))
    assert guard.skipped == 0
    assert scaler.get_scale() == 2.0**7
    assert all(value.isfinite().all() for value in module.state_dict().values())

    guard, module = NonFiniteGuard(), Scheduled()
    trainer, _ = scaled_fit(module, guard, rows(4, [1]))
    assert (guard.skipped, trainer.global_step) == (1, 4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**4)


class ScheduledBadGradient(BadGradient, Scheduled):
    pass


def test_counters_move_as_after_a_step_that_a_gradient_scaler_skips():
    def counters(trainer, update):
        schedule = trainer.lr_scheduler_configs[0].scheduler
        progress = trainer.fit_loop.epoch_loop
        return (
            (trainer.global_step, update.updates, schedule.last_epoch, schedule.get_last_lr()),
            (progress.automatic_optimization.state_dict(), progress.scheduler_progress.state_dict()),
        )

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    update, other, guard = constant(), constant(), NonFiniteGuard()
    scaled = fit(ScheduledBadGradient(), [update], loader(rows(4)), plugins=[plugin])
    assert scaler.get_scale() == 2.0**7  # it skipped one step
    guarded = fit(ScheduledBadGradient(), [guard, other], loader(rows(4)))
    assert guard.skipped == 1
    assert counters(guarded, other) == counters(scaled, update)


def test_one_host_read_in_a_step():
    class Count(NonFiniteGuard):
        reads = ()

        def on_before_optimizer_step(self, *args):
            with HostSyncs() as syncs:
                super().on_before_optimizer_step(*args)
            self.reads += (len(syncs.places),)

        def on_before_backward(self, *args):
            with HostSyncs() as syncs:
                super().on_before_backward(*args)
            assert not syncs.places

        def on_train_batch_start(self, *args):
            with HostSyncs() as syncs:
                super().on_train_batch_start(*args)
            assert not syncs.places

    guard = Count()
    fit(Pair(norm=True), [guard], loader(rows(4)), accumulate_grad_batches=2)
    assert guard.reads == (1, 1)


def test_it_changes_nothing_where_all_is_well():
    assert_callback_changes_nothing(NonFiniteGuard)


def test_count_is_kept_in_checkpoints():
    guard, again = NonFiniteGuard(), NonFiniteGuard()
    fit(Pair(), [guard], loader(rows(3, [1])))
    again.load_state_dict(guard.state_dict())
    assert again.skipped == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"action": "ignore"}, ValueError, "`action` must be one of 'skip', 'raise'"),
        ({"max_in_a_row": 0}, ValueError, "`max_in_a_row` must be >= 1"),
        ({"max_in_a_row": 1.5}, TypeError, "`max_in_a_row` must be a whole number"),
    ],
)
def test_arguments_are_checked(arguments, error, words):
    with pytest.raises(error, match=words):
        NonFiniteGuard(**arguments)


def test_large_but_finite_gradients_are_no_fault():
    class Large(Pair):
        def loss(self, batch):
            return self.online[0].weight.sum() * 1e30

    guard = NonFiniteGuard("raise")
    fit(Large(lr=1e-30), [guard], loader(rows(2)))
    assert guard.skipped == 0


def test_a_queue_callback_of_the_user_is_not_fed_either():
    a = everything(*method_fit("MoCo", views(5, 2), [QueueUpdate()], left_out=[2]))
    b = everything(*method_fit("MoCo", views(5, 2, bad=[2]), [QueueUpdate(), NonFiniteGuard()]))
    assert states_equal(a, b)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
def test_a_step_of_w_mse_without_a_cholesky_factor_is_skipped():
    """Black images and no biases: the covariance is zero on every processor. The recipes of W-MSE have the guard."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6, bias=False))
    sizes = {"feature_dim": 6, "hidden_dim": 8, "projection_dim": 2, "whitening_size": 6}
    module = lc.WMSE(backbone, **sizes, head_norm=None, lr=0.1, warmup_epochs=0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.mul_(not name.endswith("bias"))
    before = [weight.clone() for weight in module.parameters()]
    singular = [torch.zeros(6, 3, 2, 2)] * 2
    guard = lc.NonFiniteGuard()
    with pytest.warns(RuntimeWarning, match="the first is the loss. The step is skipped"):
        quiet_fit(module, [guard], [singular, [torch.rand(6, 3, 2, 2), torch.rand(6, 3, 2, 2)]])
    assert guard.skipped == 1
    assert all(weight.isfinite().all() for weight in module.parameters())
    assert any(not torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))
    recipes = Path(lc.__file__).parent.glob("recipes/wmse_*.yaml")
    assert all("class_path: NonFiniteGuard" in path.read_text() for path in recipes)
