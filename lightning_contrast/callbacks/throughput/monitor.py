"""Tells what a training step costs: images per second, where the time goes, memory, operations, energy."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_contrast._checks import check_at_least, check_not_negative, check_positive, check_word, fail
from lightning_contrast.callbacks.capture.features import count_images
from lightning_contrast.callbacks.reporting import log_values
from lightning_contrast.callbacks.throughput.report import Costs, EnergyMeter, StepFlops
from lightning_contrast.callbacks.throughput.timer import Clock, CudaClock, HostClock, Ledger
from lightning_contrast.callbacks.throughput.trainer_events import CATEGORIES, VIEWS, Events
from lightning_contrast.distributed import gather, world_size
from lightning_contrast.runtime.batch_transfer import HOOK, BatchTransforms


class TrainingCostMonitor(L.Callback):
    """Measures what the steps of a fit cost, and says at its end in words what to do about it.

    It works on any LightningModule, under `lightning` and `pytorch_lightning`, with automatic or manual optimization
    and gradient accumulation, on every strategy, and leaves the run as it was, bit for bit. It reads the events that
    every Trainer tells its profiler, whichever that is, so each moment of training belongs to one of six categories:

    - ``data``: waiting for the loader, and the transfer to the device;
    - ``views``: `ViewAugmentation`, and ``on_after_batch_transfer`` of a module or DataModule;
    - ``network``: ``training_step`` and backward, and the hooks of the module itself;
    - ``optimizer``: the optimizer's step, clipping, schedules;
    - ``plugins``: callbacks, this one too;
    - ``trainer``: the rest, the loop of the Trainer and its loggers.

    Validation is left out. On a CUDA device the times are those of the device: events in its stream, which are read
    when they have passed, so the host never waits. Elsewhere they are those of the host.

    Logged at the end of each epoch, into ``callback_metrics`` too: ``throughput/images_per_s`` (sum over the ranks),
    ``step_ms`` for a batch and ``<category>_share`` (mean over the ranks), ``memory_peak_mib`` (largest of the ranks),
    ``gflops_per_image`` and ``tflops_per_s``, ``joules_per_image``, ``kwh`` and ``co2_g_estimate``. With
    ``every_n_steps`` the loggers get the same numbers of rank 0 in between, ``images_per_s`` times the number of ranks.

    Images are those of the batch, whatever the number of views. Operations are counted in the first step, by torch's
    counter: matrix products, convolutions and attention, forward and backward, a multiplication and an addition as
    two; not where ``torch.compile`` is in use. Memory is the peak of the process: of torch's allocator on a CUDA
    device, else of all that it holds. Nothing is kept in a checkpoint: times belong to a machine. Cost: see
    ``docs/throughput.md``.

    Args:
        every_n_steps: Training batches from one entry in the loggers to the next; None: only at the end of an epoch.
        warmup: Batches at the beginning of a fit that do not count.
        flops: Count the operations of the first step.
        watts: Power of a machine to assume where no energy can be measured (RAPL, NVML), a codecarbon-like estimate;
            None: then there is no energy.
        grams_per_kwh: CO2 that the electricity costs, for the estimate; None: no estimate. The default is the mean of
            the world in 2024 (Ember, Global Electricity Review 2025).
        name: First part of the names that are logged.

    Attributes:
        summary: The words, once the fit has ended.
        costs: What was spent in this fit, from its warm-up on.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = 50,
        warmup: int = 1,
        flops: bool = True,
        watts: float | None = None,
        grams_per_kwh: float | None = 473.0,
        name: str = "throughput",
    ) -> None:
        if every_n_steps is not None:
            check_at_least("every_n_steps", every_n_steps, 1)
        check_at_least("warmup", warmup, 0)
        if watts is not None:
            check_positive("watts", watts)
        if grams_per_kwh is not None:
            check_not_negative("grams_per_kwh", grams_per_kwh)
        check_word("name", name)
        self.every_n_steps, self.warmup, self.flops = every_n_steps, warmup, flops
        self.watts, self.grams_per_kwh, self.name = watts, grams_per_kwh, name
        self.summary = ""
        self.costs = Costs()
        self._epoch = Costs()
        self._counter = StepFlops()
        self._flops_of_step: int | None = None
        self._flops_per_image = 0.0
        self._images = self._batches = 0
        self._events: Events | None = None
        self._meter: EnergyMeter | None = None
        self._device = torch.device("cpu")

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``."""
        return f"TrainingCostMonitor[{self.name}]"

    # The hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a second one, which would listen to the same events, and forget the last fit."""
        if any(isinstance(c, TrainingCostMonitor) and c is not self for c in trainer.callbacks):
            fail("callbacks", "hold one TrainingCostMonitor", "two", "Remove one of them")
        if stage == "fit":
            self.summary, self.costs, self._epoch = "", Costs(), Costs()
            self._flops_of_step, self._flops_per_image = None, 0.0
            self._images = self._batches = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen to the events, last of all that is prepared."""
        self._device = trainer.strategy.root_device
        self._meter = self._new_meter(trainer)
        self._events = Events(trainer, Ledger(self._new_clock(), self.warmup), self._take_images, self._around)
        if isinstance(vars(trainer.strategy).get(HOOK), BatchTransforms):
            BatchTransforms.add(trainer.strategy, self._before_views, first=True)
            BatchTransforms.add(trainer.strategy, self._after_views)
        self._events.open()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the images, and tell the loggers where it is time."""
        self._images = count_images(batch)
        self._batches += 1
        if self._flops_of_step is not None and not self._flops_per_image and self._images:
            self._flops_per_image = self._flops_of_step / self._images
        if self.every_n_steps is not None and self._batches % self.every_n_steps == 0:
            window = self._take()
            self._epoch.add(window)
            if trainer.loggers and trainer.is_global_zero:
                window.images *= world_size()
                values = self._named(window.values())
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what the epoch cost, all ranks together."""
        if self._events is None:
            return
        self._events.ledger.close_step(self._take_images())
        self._epoch.add(self._take())
        costs, self._epoch = self._reduced(self._epoch, pl_module.device), Costs()
        self.costs.add(costs)
        values = costs.values() | self.costs.energy(self.grams_per_kwh)
        log_values(trainer, pl_module, self._named(values), on_epoch=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say in words what the fit cost."""
        self.summary = self.costs.words(self.grams_per_kwh, trainer.train_dataloader)
        rank_zero_info(f"{type(self).__name__}: {self.summary}")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the Trainer as it was."""
        self._close(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the Trainer as it was: `teardown` is not called after an exception."""
        self._close(trainer)

    # What is measured.

    def _new_clock(self) -> Clock:
        return CudaClock(self._device) if self._device.type == "cuda" else HostClock()

    def _new_meter(self, trainer: Any) -> EnergyMeter:
        first = trainer.local_rank == 0
        return EnergyMeter(self._device, self.watts if first else None, processors=first)

    def _close(self, trainer: Any) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None
        self._counter.end()
        BatchTransforms.remove(trainer.strategy, self._before_views)
        BatchTransforms.remove(trainer.strategy, self._after_views)

    def _before_views(self, batch: Any) -> Any:
        if self._events is not None:
            self._events.enter(VIEWS)
        return batch

    def _after_views(self, batch: Any) -> Any:
        if self._events is not None:
            self._events.leave()
        return batch

    def _around(self, begins: bool) -> None:
        """Count the operations of the first step."""
        if begins:
            if self.flops and self._flops_of_step is None and not self._counter.begin():
                self._flops_of_step = 0
        elif self._flops_of_step is None:
            self._flops_of_step = self._counter.end()

    def _take_images(self) -> int:
        images, self._images = self._images, 0
        return images

    def _take(self) -> Costs:
        """Return what this rank has spent since the last call."""
        assert self._events is not None
        assert self._meter is not None
        seconds, images, steps = self._events.ledger.take()
        costs = Costs(dict.fromkeys(CATEGORIES, 0.0), images, steps, flops=self._flops_per_image)
        for name, spent in seconds.items():
            category, _, plugin = name.partition("/")
            if category in costs.seconds:
                costs.seconds[category] += spent
            if plugin:
                costs.plugins[plugin] = spent
        costs.joules, costs.measured = self._meter.take(), self._meter.measured
        costs.memory_mib = peak_memory_mib(self._device)
        return costs

    def _reduced(self, costs: Costs, device: torch.device) -> Costs:
        """Return the costs of all ranks; every rank must call it."""
        known = costs.joules is not None
        numbers = [costs.images, costs.steps, costs.joules or 0.0, known, costs.measured, costs.flops, costs.memory_mib]
        kind = torch.float32 if device.type == "mps" else torch.float64
        own = torch.tensor([[*numbers, *costs.seconds.values()]], dtype=kind, device=device)
        ranks = gather(own, [1] * world_size())  # (ranks, numbers)
        total, most = ranks.sum(dim=0).tolist(), ranks.max(dim=0).values.tolist()
        seconds = (value / len(ranks) for value in total[len(numbers) :])
        return Costs(
            dict(zip(costs.seconds, seconds, strict=True)),
            images=total[0],
            steps=total[1] / len(ranks),
            joules=total[2] if most[3] else None,
            measured=bool(most[4]),
            flops=most[5],
            memory_mib=most[6],
            plugins=costs.plugins,
        )

    def _named(self, values: dict[str, float]) -> dict[str, float]:
        return {f"{self.name}/{key}": value for key, value in values.items()}


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory that this process ever held, in MiB: on a CUDA device what torch allocated there.

    Args:
        device: Of the run.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # the high-water mark of this program; getrusage counts that of its parent before the start
        lines = (line.split() for line in status.read_text().splitlines())
        return next(float(words[1]) for words in lines if words and words[0] == "VmHWM:") / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, where there is no /proc
