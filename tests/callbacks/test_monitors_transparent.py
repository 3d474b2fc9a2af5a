"""A run that the monitors watch ends with the weights of a run that is not watched, bit for bit."""

import lightning as L
import pytest
import torch

from lightning_contrast.callbacks import CollapseMonitor, ContrastMonitor, MomentumUpdate, QueueUpdate
from tests.callbacks.monitor_modules import Queued, TwoViews, views_loader
from tests.callbacks.probe_modules import equal_states, labelled, quiet_fit
from tests.callbacks.strategies import STRATEGIES, TakeWeights, fit_ranks, sharded
from tests.callbacks.test_linear_probe_transparent import Sharding, random_state, trainers
from tests.launch import run_processes


class ByHand(TwoViews):
    """Two views under manual optimization, two steps of the optimizer for each batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            loss = super().training_step(batch, batch_idx)["loss"]
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()


MODULES = {"automatic": TwoViews, "manual": ByHand, "queue": Queued}


def monitors(every=2):
    return [CollapseMonitor(every_n_steps=every, features="backbone.1"), ContrastMonitor(every_n_steps=every)]


def plugins(module):
    return [QueueUpdate(), MomentumUpdate(0.9)] if isinstance(module, Queued) else []


def compare(make, watchers, **settings):
    """Return the run that is watched, having compared it with one that is not."""
    alone, watched = make(), make()
    quiet_fit(alone, plugins(alone), views_loader(), **settings)
    after_alone = random_state()
    run = quiet_fit(watched, [*plugins(watched), *watchers], views_loader(), **settings)
    after_watched = random_state()
    assert equal_states(alone.state_dict(), watched.state_dict())
    assert torch.equal(after_alone[0], after_watched[0])
    assert after_alone[1:] == after_watched[1:]
    assert not equal_states(make().state_dict(), watched.state_dict())  # it did learn
    assert all(not module._forward_hooks for module in watched.modules())
    assert run.callback_metrics["collapse/rankme"] > 0
    return run


@pytest.mark.parametrize("kind", MODULES)
def test_weights_and_random_numbers_are_those_of_a_run_without_monitors(kind):
    run = compare(MODULES[kind], monitors())
    assert "contrast/top1" in run.callback_metrics


def test_in_a_pytorch_lightning_trainer():
    trainer, base = trainers()["pytorch_lightning"]

    class Foreign(base):
        __init__, embed, training_step = TwoViews.__init__, TwoViews.embed, TwoViews.training_step
        validation_step, configure_optimizers = TwoViews.validation_step, TwoViews.configure_optimizers

    def make():
        module = Foreign.__new__(Foreign)
        base.__init__(module)
        source = TwoViews()
        module.backbone, module.projector = source.backbone, source.projector
        module.temperature, module.joined, module.lr = source.temperature, source.joined, source.lr
        return module

    compare(make, monitors(), trainer=trainer)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
        {"val_check_interval": 2, "num_sanity_val_steps": 0},
    ],
    ids=str,
)
def test_weights_are_the_same_under_other_settings(settings):
    compare(TwoViews, monitors(), **settings)


def test_weights_are_the_same_when_measured_at_validation():
    compare(TwoViews, [CollapseMonitor(every_n_steps=None), ContrastMonitor(every_n_steps=3)])


def test_weights_are_the_same_after_a_second_fit_and_a_resume(tmp_path):
    def weights(watchers, name):
        module = TwoViews()
        trainer = quiet_fit(module, watchers, views_loader(), max_epochs=1)
        trainer.save_checkpoint(tmp_path / name)
        trainer.fit_loop.max_epochs = 2
        quiet_fit(module, [], views_loader(), trainer=trainer)
        resumed = TwoViews()
        again = monitors() if watchers else []
        quiet_fit(resumed, again, views_loader(), max_epochs=3, ckpt_path=tmp_path / name)
        return module.state_dict(), resumed.state_dict()

    for alone, watched in zip(weights([], "alone.ckpt"), weights(monitors(), "watched.ckpt"), strict=True):
        assert equal_states(alone, watched)
    names = [
        torch.load(tmp_path / name, weights_only=True)["state_dict"].keys() for name in ("alone.ckpt", "watched.ckpt")
    ]
    assert names[0] == names[1]


def compiled_and_not(rank):
    def fit(watchers):
        torch._dynamo.reset()
        module = TwoViews()
        torch.manual_seed(0)
        quiet_fit(torch.compile(module, backend="eager"), watchers, views_loader())
        return module.state_dict()

    watchers = monitors()
    return equal_states(fit([]), fit(watchers)), len(watchers[0].course)


@pytest.mark.dist
def test_weights_are_the_same_when_compiled():
    # In a process of its own: once a compiled module was trained, autograd refuses to run in forks of the process.
    ((same, measurements),) = run_processes(compiled_and_not, 1, init=False)
    assert same
    assert measurements == 4


class Loaders(L.LightningDataModule):
    def __init__(self, make):
        super().__init__()
        self.train_dataloader = make


def weights_of_rank(rank, name, watched):
    take = TakeWeights()
    module = sharded(Sharding)() if name != "ddp" else TwoViews()
    data = Loaders(labelled if name != "ddp" else views_loader)
    watchers = [CollapseMonitor(every_n_steps=2), ContrastMonitor(every_n_steps=2)] if watched else []
    run = fit_ranks(module, [take, *(watchers if name == "ddp" else watchers[:1])], data, name, limit_val_batches=0)
    return take.history[-1], {key: float(value) for key, value in run.callback_metrics.items()}


@pytest.mark.dist
@pytest.mark.parametrize("name", STRATEGIES)
def test_weights_are_the_same_on_two_ranks(name):
    alone = run_processes(weights_of_rank, 2, name, False, init=False)
    watched = run_processes(weights_of_rank, 2, name, True, init=False)
    for rank in range(2):
        assert equal_states(alone[rank][0], watched[rank][0])
    assert watched[0][1] == watched[1][1]
    assert watched[0][1]["collapse/rankme"] > 0
