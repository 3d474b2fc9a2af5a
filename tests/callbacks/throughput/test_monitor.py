"""`TrainingCostMonitor` with a timer that the test advances, so that every share is known."""

import importlib.machinery
import logging
import math
import socket
import sys
import threading
import types

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_contrast.callbacks import StepSeed, TrainingCostMonitor, ViewAugmentation
from lightning_contrast.callbacks.throughput.meters import EnergyMeter, StepFlopCounter, peak_memory_mib
from lightning_contrast.callbacks.throughput.report import StepStatistics
from lightning_contrast.callbacks.throughput.timer import CudaTimer, StepTimer
from lightning_contrast.distributed import rank
from lightning_contrast.testing import HostSyncs, assert_callback_changes_nothing, assert_resume_exact, run_processes
from tests.callbacks.probe_modules import (
    Loaders,
    Sharding,
    adversary,
    classifier,
    equal_states,
    labelled,
    quiet_fit,
    random_state,
    trainers,
)
from tests.callbacks.strategies import TakeWeights, fit_ranks, sharded
from tests.tolerances import near

ON_CPU = torch.device("cpu")


class FakeTimer:
    """Advances on demand; a mark is ready ``late`` marks after it was made, and is reused once recycled."""

    def __init__(self, late=0):
        self.time, self.late, self.made, self.spare, self.marks = 0.0, late, 0, [], 0

    def spend(self, seconds):
        self.time += seconds

    def now(self):
        self.made += 1
        self.marks += not self.spare
        mark = self.spare.pop() if self.spare else []
        mark[:] = [self.time, self.made]
        return mark

    def ready(self, mark):
        return self.made >= mark[1] + self.late

    def seconds(self, start, end):
        return end[0] - start[0]

    def recycle(self, mark):
        self.spare.append(mark)


class SlowSet(Dataset):
    def __init__(self, timer, seconds, count):
        self.timer, self.seconds, self.count = timer, seconds, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.timer.spend(self.seconds)
        return torch.full((3, 8, 8), index / 100), index % 3


def slow_module(base, timer, automatic):
    """Return a module whose step takes 3 seconds, its backward 2, its optimizer 1, its own hook 0.25."""

    class Slow(base):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.layer = nn.Linear(192, 3)

        def training_step(self, batch, batch_idx):
            timer.spend(3)
            images = batch[0][0] if isinstance(batch[0], list) else batch[0]
            output = self.layer(images.flatten(1))
            output.register_hook(lambda gradient: timer.spend(2))
            loss = nn.functional.cross_entropy(output, batch[1])
            if not automatic:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

        def on_train_batch_end(self, *args):
            timer.spend(0.25)

        def validation_step(self, batch, batch_idx):
            timer.spend(1000)

        def configure_optimizers(self):
            class Slow(torch.optim.SGD):
                def step(self, closure=None):
                    with torch.enable_grad():
                        loss = closure() if closure is not None else None
                    timer.spend(1)
                    return loss

            return Slow(self.parameters(), lr=0.01)

    return Slow()


class SlowPolicy:
    def __init__(self, timer):
        self.timer = timer

    def __call__(self, images):
        self.timer.spend(4)
        return [images, images]

    def eval_transform(self, images):
        self.timer.spend(500)
        return images


class SlowCallback(L.Callback):
    def __init__(self, timer):
        self.timer = timer

    def on_train_batch_start(self, *args):
        self.timer.spend(0.5)

    def on_before_optimizer_step(self, *args):
        self.timer.spend(0.75)

    def on_validation_epoch_end(self, *args):
        self.timer.spend(300)


def timed(library="lightning", automatic=True, views=True, timer=None, **settings):
    """Fit 2 epochs of 4 batches of 5 images, 0.1 seconds each, and return the trainer and the monitor."""
    timer = timer or FakeTimer()
    trainer, base = trainers()[library] if library != "lightning" else (L.Trainer, L.LightningModule)
    monitor = TrainingCostMonitor(every_n_steps=3)
    monitor._new_timer = lambda: timer
    augment = [ViewAugmentation(SlowPolicy(timer))] if views else []
    callbacks = [monitor, *augment, SlowCallback(timer)]
    train = DataLoader(SlowSet(timer, 0.1, 20), batch_size=5)
    val = DataLoader(SlowSet(timer, 100.0, 2), batch_size=2)
    run = quiet_fit(slow_module(base, timer, automatic), callbacks, train, val, trainer=trainer, **settings)
    return run, monitor


EXPECTED = {"data": 0.5, "views": 4.0, "network": 5.25, "optimizer": 1.0, "callbacks": 1.25, "trainer": 0.0}


@pytest.mark.parametrize("library", ["lightning", "pytorch_lightning"])
@pytest.mark.parametrize("automatic", [True, False])
def test_every_second_of_a_step_is_where_it_belongs(library, automatic):
    run, monitor = timed(library, automatic)
    total = sum(EXPECTED.values())
    metrics = run.callback_metrics
    for category, seconds in EXPECTED.items():
        assert metrics[f"throughput/{category}_share"] == pytest.approx(seconds / total), category
    assert metrics["throughput/images_per_s"] == pytest.approx(5 / total)
    assert metrics["throughput/step_ms"] == pytest.approx(1000 * total)
    assert monitor.statistics.steps == 7  # the first is its warm-up
    assert monitor.statistics.images == 35
    seconds = {"SlowCallback": 7 * 1.25, "TrainingCostMonitor": 0.0, "ViewAugmentation": 0.0}
    assert monitor.statistics.callback_seconds == pytest.approx(seconds)
    assert f"{5.25 / total:.0%} forward and backward" in monitor.summary


def test_views_of_a_module_and_accumulated_steps():
    timer = FakeTimer()

    class Views(type(slow_module(L.LightningModule, timer, True))):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            timer.spend(4)
            return batch

    monitor = TrainingCostMonitor()
    monitor._new_timer = lambda: timer
    loaders = [DataLoader(SlowSet(timer, 0.1, 20), batch_size=5) for _ in range(2)]
    run = quiet_fit(Views(), [monitor], *loaders, accumulate_grad_batches=2, max_epochs=1, num_sanity_val_steps=0)
    assert monitor.statistics.seconds == pytest.approx(
        {"data": 1.5, "views": 12.0, "network": 3 * 5.25, "optimizer": 2.0, "callbacks": 0.0, "trainer": 0.0}
    )  # of three batches, two with a step
    assert run.callback_metrics["throughput/data_share"] == near(1.5 / 31.25)


def test_a_device_that_is_behind_gives_the_same_times_and_is_not_waited_for():
    timer = FakeTimer(late=25)
    run, monitor = timed(timer=timer)
    total = sum(EXPECTED.values())
    for category, seconds in EXPECTED.items():
        assert run.callback_metrics[f"throughput/{category}_share"] == near(seconds / total)
    assert 4 <= monitor.statistics.steps < 7  # those of the last steps have not passed at the end


def test_marks_are_used_again_and_what_is_not_read_is_bounded():
    timer = FakeTimer()
    step_timer = StepTimer(timer, warmup=0)
    for _ in range(50):
        for category in ("data", "network", "data"):
            step_timer.switch(category)
            timer.spend(1)
        step_timer.end_step(4)
    assert timer.marks <= 8
    assert step_timer.take() == ({"data": 100.0, "network": 50.0}, 200, 50)
    never = FakeTimer(late=math.inf)
    step_timer = StepTimer(never, warmup=0)
    for _ in range(StepTimer.MAX_PENDING + 50):
        step_timer.switch("data")
        step_timer.end_step(4)
    assert len(step_timer._pending) == StepTimer.MAX_PENDING
    assert step_timer.take() == ({}, 0, 0)


def test_events_of_a_cuda_device_are_recorded_in_its_stream_and_used_again(monkeypatch):
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.milliseconds = 0

        def record(self, stream):
            recorded.append(stream)
            self.milliseconds = 250 * len(recorded)

        def query(self):
            return len(recorded) > 2

        def elapsed_time(self, other):
            return other.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    timer = CudaTimer(torch.device("cuda", 1))
    first, second = timer.now(), timer.now()
    assert not timer.ready(second)
    assert timer.seconds(first, second) == 0.25
    timer.recycle(first)
    assert timer.now() is first
    assert timer.ready(second)
    assert recorded == ["stream of cuda:1"] * 3


def test_nothing_waits_for_the_device_but_the_end_of_an_epoch():
    monitor = TrainingCostMonitor(every_n_steps=2)
    with HostSyncs() as syncs:
        quiet_fit(classifier()(), [monitor], max_epochs=1)
    places = [place for place in syncs.places if "callbacks/throughput/" in place]
    assert {place.split(" in ")[1].split(":")[0] for place in places} == {"_reduced"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_times_of_a_cuda_device():
    monitor = TrainingCostMonitor()
    run = quiet_fit(classifier()(), [monitor], accelerator="gpu")
    shares = [value for name, value in run.callback_metrics.items() if name.endswith("_share")]
    assert sum(shares) == pytest.approx(1)
    assert run.callback_metrics["throughput/memory_peak_mib"] > 0


class Linear(L.LightningModule):
    """One layer without bias: 2 B F C operations forward and, for its weights, as many backward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(192, 3, bias=False)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0].flatten(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr("lightning_contrast.callbacks.throughput.meters._uses_compile", lambda: False)


def test_operations_of_an_image_are_counted_once(nothing_compiled):
    monitor = TrainingCostMonitor()
    run = quiet_fit(Linear(), [monitor])
    assert run.callback_metrics["throughput/gflops_per_image"] == near(2 * 2 * 192 * 3 / 1e9)
    rate = run.callback_metrics["throughput/images_per_s"]
    assert run.callback_metrics["throughput/tflops_per_s"] == near(4 * 192 * 3 * rate / 1e12)
    assert "2.3 kFLOP per image and training step" in monitor.summary


def test_operations_are_those_of_the_counter_of_torch_on_a_copy(nothing_compiled):
    monitor, batch = TrainingCostMonitor(), next(iter(labelled()))
    quiet_fit(classifier()(), [monitor])
    with FlopCounterMode(display=False) as counter:
        classifier()().training_step(batch, 0).backward()
    assert monitor.statistics.flops_per_image == counter.get_total_flops() / 8


def test_nothing_is_counted_where_code_is_compiled(monkeypatch):
    frames = pytest.importorskip("torch._dynamo.eval_frame")
    counter = StepFlopCounter()
    monkeypatch.setattr(frames, "cached_backends", {0: None})  # of `torch.compiler.disable`, which torch uses itself
    assert counter.start()
    assert counter.stop() == 0
    monkeypatch.setattr(frames, "cached_backends", {0: None, 1: len})
    assert not counter.start()
    monitor = TrainingCostMonitor()
    run = quiet_fit(Linear(), [monitor])
    assert "throughput/gflops_per_image" not in run.callback_metrics
    assert "FLOP" not in monitor.summary


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
        {"profiler": "simple", "gradient_clip_val": 0.1, "val_check_interval": 2},
    ],
    ids=str,
)
def test_the_run_is_the_same(settings, nothing_compiled):
    assert_callback_changes_nothing(lambda: TrainingCostMonitor(every_n_steps=2), **settings)


@pytest.mark.parametrize("library", ["lightning", "pytorch_lightning"])
@pytest.mark.parametrize("kind", [classifier, adversary])
def test_weights_and_random_numbers_are_those_of_a_run_without_it(library, kind, nothing_compiled):
    trainer, base = trainers()[library]
    make = kind(base)
    alone, watched = make(), make()
    quiet_fit(alone, [], trainer=trainer)
    after_alone = random_state()
    run = quiet_fit(watched, [TrainingCostMonitor(every_n_steps=2)], trainer=trainer)
    after_watched = random_state()
    assert equal_states(alone.state_dict(), watched.state_dict())
    assert torch.equal(after_alone[0], after_watched[0])
    assert after_alone[1:] == after_watched[1:]
    shares = [value for name, value in run.callback_metrics.items() if name.endswith("_share")]
    assert len(shares) == 6
    assert sum(shares) == pytest.approx(1)
    assert run.callback_metrics["throughput/gflops_per_image"] > 0


@pytest.mark.dist
def test_the_run_is_the_same_on_two_ranks(nothing_compiled):
    assert_callback_changes_nothing(lambda: TrainingCostMonitor(every_n_steps=2), world_size=2, max_epochs=1)


def weights_of_rank(rank, name, watched):
    take, monitor = TakeWeights(), TrainingCostMonitor()
    run = fit_ranks(sharded(Sharding)(), [take, *([monitor] if watched else [])], Loaders(), name)
    metrics = {key: float(value) for key, value in run.callback_metrics.items()}
    return take.history[-1], metrics


@pytest.mark.dist
@pytest.mark.parametrize("name", ["fsdp1 wrapped", "fsdp2"])
def test_weights_are_the_same_where_they_are_sharded(name, nothing_compiled):
    alone = run_processes(weights_of_rank, 2, name, False, init=False)
    watched = run_processes(weights_of_rank, 2, name, True, init=False)
    for of_rank in range(2):
        assert equal_states(alone[of_rank][0], watched[of_rank][0])
    assert watched[0][1] == watched[1][1]
    assert watched[0][1]["throughput/gflops_per_image"] > 0


def reduced(_):
    monitor, mine = TrainingCostMonitor(), rank() + 1
    seconds = {name: float(mine) for name in ("data", "network")}
    own = StepStatistics(seconds, images=10 * mine, steps=5, memory_mib=100.0 * mine, flops_per_image=7.0)
    own.callback_seconds, own.kwh = {"A": float(mine)}, 4.0 if mine == 1 else None
    return monitor._reduced(own, ON_CPU)


@pytest.mark.dist
def test_statistics_of_two_ranks():
    first, second = run_processes(reduced, 2)
    assert first.seconds == second.seconds == {"data": 1.5, "network": 1.5}
    assert first.images == 30
    assert first.values()["images_per_s"] == 10
    assert (first.steps, first.memory_mib, first.flops_per_image, first.kwh) == (5, 200, 7, 4)
    assert second.callback_seconds == {"A": 2}


def test_a_resumed_run_is_the_run_that_was_not_stopped():
    assert_resume_exact(
        classifier(), lambda: (labelled(), labelled(16, seed=5)), lambda: [StepSeed(0), TrainingCostMonitor()]
    )


def test_the_trainer_is_left_as_it_was_and_a_second_fit_begins_anew():
    monitor = TrainingCostMonitor(every_n_steps=None)
    run = quiet_fit(Linear(), [monitor], profiler="simple")
    recorded = dict(run.profiler.recorded_durations)
    assert len(recorded["run_training_batch"]) == 12  # the profiler of the Trainer has seen everything too
    assert not {"start", "stop"} & vars(run.profiler).keys()
    assert monitor.statistics.steps == 11
    run.fit_loop.max_epochs = 3
    quiet_fit(Linear(), [], trainer=run)
    assert monitor.statistics.steps == 5


def test_after_an_exception_the_trainer_is_as_it_was(nothing_compiled):
    class Failing(Linear):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("out of memory")

    monitor = TrainingCostMonitor()
    run = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[monitor], accelerator="cpu")
    with pytest.raises(RuntimeError, match="out of memory"):
        quiet_fit(Failing(), [], trainer=run)
    assert not {"start", "stop"} & vars(run.profiler).keys()
    assert "batch_to_device" not in vars(run.strategy)
    with FlopCounterMode(display=False) as counter:  # the monitor's own is not left open
        torch.ones(2, 3) @ torch.ones(3, 4)
    assert counter.get_total_flops() == 48
    assert monitor._flop_counter._mode is None


class Remember(L.pytorch.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.seen = []

    def log_metrics(self, metrics, step):
        self.seen.append((step, metrics))


def test_loggers_get_numbers_every_n_steps():
    logger = Remember()
    quiet_fit(Linear(), [TrainingCostMonitor(every_n_steps=2)], logger=logger, max_epochs=1)
    steps = [step for step, metrics in logger.seen if "throughput/images_per_s" in metrics]
    assert steps[:2] == [4, 6]  # at step 2 there was one step after the warm-up, which had not ended


class Tracker:
    """Stands in for codecarbon's tracker: 0.25 kWh per flush, reported to the output handlers."""

    made = []  # noqa: RUF012

    def __init__(self, output_handlers, output_methods, **settings):
        assert output_methods == []
        assert settings["emissions_endpoint"] is None
        self.handlers, self.calls = output_handlers, []
        self.made.append(self)

    def start(self):
        self.calls.append("start")

    def flush(self):
        self.calls.append("flush")
        for handler in self.handlers:
            handler.out(types.SimpleNamespace(energy_consumed=0.25 * self.calls.count("flush")), None)

    def stop(self):
        self.calls.append("stop")


@pytest.fixture
def fake_codecarbon(monkeypatch):
    package, output = types.ModuleType("codecarbon"), types.ModuleType("codecarbon.output")
    package.__spec__ = importlib.machinery.ModuleSpec("codecarbon", None)
    package.OfflineEmissionsTracker, output.BaseOutput = Tracker, object
    monkeypatch.setitem(sys.modules, "codecarbon", package)
    monkeypatch.setitem(sys.modules, "codecarbon.output", output)
    monkeypatch.setattr(Tracker, "made", [])


def test_energy_is_that_of_codecarbon(fake_codecarbon):
    monitor = TrainingCostMonitor(energy=True, every_n_steps=2, grams_per_kwh=400.0)
    run = quiet_fit(Linear(), [monitor])  # 2 epochs of 6 batches: 4 readings each
    metrics = run.callback_metrics
    assert metrics["throughput/kwh"] == pytest.approx(8 * 0.25)
    assert metrics["throughput/joules_per_image"] == pytest.approx(4 * 0.25 * 3.6e6 / 48)
    assert metrics["throughput/co2_g_estimate"] == pytest.approx(8 * 0.25 * 400)
    assert "2 kWh, an estimated 800 g CO2 at 400 g/kWh." in monitor.summary
    (tracker,) = Tracker.made
    assert tracker.calls == ["start", *["flush"] * 8, "stop"]


def test_energy_is_not_measured_unless_asked_for(fake_codecarbon):
    run = quiet_fit(Linear(), [TrainingCostMonitor()])
    assert not Tracker.made
    assert not {"throughput/kwh", "throughput/joules_per_image"} & run.callback_metrics.keys()


def test_the_energy_meter_is_stopped_after_an_exception(fake_codecarbon):
    class Failing(Linear):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        quiet_fit(Failing(), [TrainingCostMonitor(energy=True)])
    assert Tracker.made[0].calls == ["start", "stop"]


def test_no_energy_is_reported_where_codecarbon_fails(fake_codecarbon, monkeypatch):
    monkeypatch.setattr(Tracker, "flush", lambda self: None)
    meter = EnergyMeter()
    assert meter.take() is None


def test_a_missing_codecarbon_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs codecarbon.*pip install 'lightning_contrast\[energy\]'"):
        TrainingCostMonitor(energy=True)
    TrainingCostMonitor()


def test_codecarbon_changes_nothing_opens_no_connection_and_writes_no_file(tmp_path, monkeypatch, nothing_compiled):
    pytest.importorskip("codecarbon")

    def refuse(*args):
        raise AssertionError(f"a network connection to {args}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert_callback_changes_nothing(lambda: TrainingCostMonitor(every_n_steps=2, energy=True), max_epochs=1)
    monitor = TrainingCostMonitor(every_n_steps=2, energy=True)
    threads = set(threading.enumerate())
    run = quiet_fit(Linear(), [monitor])
    assert monitor.statistics.kwh > 0
    assert run.callback_metrics["throughput/kwh"] == near(monitor.statistics.kwh)
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)  # a canceled timer ends at once
        assert not thread.is_alive()
    assert not list(tmp_path.iterdir())


def spent(**seconds):
    return StepStatistics(seconds, images=100, steps=10, callback_seconds={"Slow": 0.3, "Fast": 0.01})


def test_rates_are_sums_over_the_time_of_all_steps():
    statistics = spent(network=4.0, data=1.0)
    statistics.flops_per_image = 3e12
    assert statistics.rates() == pytest.approx({"batches_per_sec": 2, "samples_per_sec": 20, "flops_per_sec": 6e13})
    assert statistics.values()["step_ms"] == pytest.approx(500)
    assert statistics.values()["tflops_per_s"] == pytest.approx(60)
    assert StepStatistics().rates() == {}


def test_advice_names_the_largest_shares():
    loader = labelled()
    text = spent(data=5.8, network=4.2).summary(None, loader)
    assert "58% waiting for data: try more workers (`num_workers` is 0), or `ImageDataModule`" in text
    assert "10 images/s, 1,000.0 ms per batch: 58% waiting for data, 42% forward and backward." in text
    advice = spent(data=0.5, network=7.0, callbacks=2.5).advice(loader)
    assert advice == ["25% callbacks: try running callbacks less often (Slow 3.0%, Fast 0.1%)."]
    both = spent(views=4.0, data=2.0, network=4.0).advice(None)
    assert [advice[:3] for advice in both] == ["40%", "20%"]
    assert "no bottleneck elsewhere" in spent(network=9.0, data=1.0).advice(None)[0]


def test_a_fit_without_a_step_beyond_its_warmup_says_so(caplog):
    monitor = TrainingCostMonitor(warmup=1000)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run = quiet_fit(Linear(), [monitor])
    assert "no step was timed" in monitor.summary
    assert "throughput/images_per_s" not in run.callback_metrics
    assert "TrainingCostMonitor: no step was timed" in caplog.text


def test_memory_is_that_of_this_process():
    before = peak_memory_mib(ON_CPU)
    held = torch.ones(64 * 2**20 // 4)
    assert before + 100_000 > peak_memory_mib(ON_CPU) >= held.nbytes / 2**20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be >= 1, got 0"),
        ({"warmup": -1}, "`warmup` must be >= 0"),
        ({"grams_per_kwh": -1.0}, "`grams_per_kwh` must be >= 0"),
        ({"name": ""}, "`name` must be a word"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        TrainingCostMonitor(**arguments)


def test_a_second_monitor_is_refused():
    with pytest.raises(ValueError, match="contain one TrainingCostMonitor"):
        quiet_fit(Linear(), [TrainingCostMonitor(), TrainingCostMonitor(name="other")])
