"""A run that is watched is the run that is not: every callback that looks on, under every condition, bit for bit.

Compared are weights, buffers, optimizers, batches, losses, modes, learning rates and random generators. Each callback
alone is in the plain single process, all of them together are in every condition.
"""

import copy
import io
import pickle

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.utilities.compile import from_compiled

from lightning_contrast.callbacks import CollapseMonitor, MomentumUpdate, QueueUpdate, StepSeed
from lightning_contrast.callbacks.collapse import monitor as collapse_monitor
from lightning_contrast.testing import assert_callback_changes_nothing, assert_resume_exact
from lightning_contrast.testing._trace import _leaves, first_difference
from tests.callbacks.probe_modules import quiet_fit
from tests.callbacks.strategies import STRATEGIES, TakeWeights, strategy
from tests.callbacks.watchers import (
    WATCHERS,
    ByHand,
    Images,
    Queued,
    ShardedViews,
    TwoViews,
    data,
    moments,
    two_views,
    views,
    watchers,
)
from tests.launch import run_processes


@pytest.mark.parametrize("name", WATCHERS)
@pytest.mark.slow
def test_each_alone(name):
    assert_callback_changes_nothing(lambda: watchers(name), TwoViews, data, views)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (TwoViews, {}),
        (TwoViews, {"precision": "bf16-mixed"}),
        (TwoViews, {"precision": "bf16-true"}),
        (TwoViews, {"precision": "64-true"}),
        (TwoViews, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}),
        (TwoViews, {"val_check_interval": 2, "num_sanity_val_steps": 0}),
        (TwoViews, {"inference_mode": False}),
        (ByHand, {}),
        (Queued, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(map(str, value.values())),
)
@pytest.mark.slow
def test_all_in_one_process(make, settings):
    plugins = [QueueUpdate, lambda: MomentumUpdate(0.9)] if make is Queued else []
    assert_callback_changes_nothing(
        watchers, make, data, lambda: [*views(), *(plugin() for plugin in plugins)], **settings
    )


class Shards(TakeWeights):
    """Fails where a strategy that should divide the weights among the ranks does not."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        assert self.local_share < 0.75, self.local_share

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass


@pytest.mark.dist
@pytest.mark.parametrize("name", STRATEGIES)
def test_all_on_two_ranks(name):
    make, extra = (TwoViews, list) if name == "ddp" else (ShardedViews, lambda: [Shards()])
    assert_callback_changes_nothing(
        watchers, make, data, lambda: [*views(), *extra()], world_size=2, strategy=strategy(name)
    )


@pytest.mark.parametrize("library", [L, pytorch_lightning], ids=lambda library: library.__name__)
@pytest.mark.slow
def test_all_in_further_fits(library, tmp_path):
    make = two_views(library.LightningModule)
    alone, watched = (
        moments([*views(), *watching], make, data, tmp_path, library, fits=3) for watching in ([], watchers())
    )
    assert len(alone) == 2 * 6 * (2 + 1 + 1) + 3  # before and in each batch of four epochs, and three ends
    assert first_difference(alone, watched, ["callback *"]) is None


def compiled_module():
    torch._dynamo.reset()
    return from_compiled(torch.compile(TwoViews(), backend="aot_eager"))


def compiled_backbone():
    torch._dynamo.reset()
    module = TwoViews()
    module.backbone = torch.compile(module.backbone, backend="aot_eager")
    return module


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's, of `self.log`
@pytest.mark.parametrize(
    ("make", "names"), [(compiled_module, ()), (compiled_backbone, ("OnlineLinearProbe", "CollapseMonitor"))]
)
def test_all_compiled(make, names):
    # In a process of its own: once a compiled module was trained, autograd refuses to run in forks of the process.
    def compare(rank):
        assert_callback_changes_nothing(lambda: watchers(*names), make, data, views, max_epochs=1)

    run_processes(compare, 1, init=False, timeout=400)


# A run that goes on from a checkpoint.


class Figures(L.Callback):
    """Keeps what the callbacks logged last as a state, so that two runs are compared by it too."""

    def __init__(self, *but):
        self.but, self.metrics = but, {}

    def on_train_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics.items()
        self.metrics = {key: float(value) for key, value in metrics if not any(word in key for word in self.but)}

    def state_dict(self):
        return self.metrics


@pytest.mark.parametrize("stop", ["epoch end", "mid-epoch"])
@pytest.mark.slow
def test_each_goes_on_exactly_and_shows_the_same(stop):
    # Means over the epoch in which a run was stopped are those of its second half: Lightning keeps no others either.
    partial = ("throughput",) if stop == "epoch end" else ("throughput", "train_")
    assert_resume_exact(
        TwoViews,
        lambda: Images(batch_size=8),
        lambda: [*views(), StepSeed(0), *watchers(), Figures("loss", *partial)],
        stop=stop,
        max_epochs=3,
    )


# What a checkpoint holds of them.


class Sizes(L.Callback):
    """Takes at the end of each epoch how large the states of the callbacks are: bytes of tensors, bytes saved."""

    def on_train_epoch_end(self, trainer, pl_module):
        self.sizes = getattr(self, "sizes", [])
        self.sizes.append([size(callback.state_dict()) for callback in trainer.callbacks])


def size(state):
    file = io.BytesIO()
    torch.save(state, file)
    return sum(value.nbytes for _, value in _leaves(state) if isinstance(value, torch.Tensor)), file.tell()


@pytest.mark.slow
def test_what_a_checkpoint_holds_is_small_and_does_not_grow(monkeypatch, tmp_path):
    monkeypatch.setattr(collapse_monitor, "MAX_HISTORY", 2)  # 512: it is full after so many measurements
    watching, sizes = watchers(), Sizes()
    quiet_fit(TwoViews(), [*views(), *watching, sizes], *data(), max_epochs=8, default_root_dir=tmp_path)
    by_epoch = list(zip(*sizes.sizes, strict=True))[1 : 1 + len(WATCHERS)]
    for (name, row), course in zip(WATCHERS.items(), by_epoch, strict=True):
        assert max(tensors for tensors, _ in course) <= row.tensor_bytes, name
        assert max(saved - tensors for tensors, saved in course) <= 16_384, name  # names, numbers, the archive itself
        # After five measurements all is full. One takes four batches, an epoch has six: every second epoch is alike.
        assert max(saved for _, saved in course[6:]) <= max(saved for _, saved in course[4:6]) + 64, name


def test_a_measurement_kept_is_below_a_kibibyte(tmp_path):
    monitor = CollapseMonitor(every_n_steps=4)
    quiet_fit(TwoViews(), [*views(), monitor], *data(), max_epochs=2, default_root_dir=tmp_path)
    record = monitor.state_dict()["history"][-1]
    few, many = (pickle.dumps([copy.deepcopy(record) for _ in range(count)]) for count in (1, 5))
    assert len(many) - len(few) <= 4 * 1024
