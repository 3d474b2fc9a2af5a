"""Throughput, step-time shares, memory, FLOPs and energy of training."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_contrast._checks import check_at_least, check_not_negative, check_word, fail
from lightning_contrast.callbacks.capture.features import count_images
from lightning_contrast.callbacks.reporting import log_values
from lightning_contrast.callbacks.throughput.meters import (
    EnergyMeter,
    StepFlopCounter,
    check_codecarbon,
    peak_memory_mib,
)
from lightning_contrast.callbacks.throughput.report import StepStatistics
from lightning_contrast.callbacks.throughput.timer import CudaTimer, StepTimer, Timer
from lightning_contrast.callbacks.throughput.trainer_events import CATEGORIES, VIEWS, ProfilerListener
from lightning_contrast.distributed import gather, world_size
from lightning_contrast.runtime.batch_transfer import HOOK, BatchTransforms


class TrainingCostMonitor(L.Callback):
    """Log throughput and step-time shares; print advice after fit.

    Needs no module of this package; for `lightning` and `pytorch_lightning`, automatic or manual optimization, gradient
    accumulation, DDP, FSDP1 and FSDP2; training stays bit-identical. The callback reads the events that a Trainer sends
    to its profiler, whichever is in use, and assigns the time of training to six categories:

    - ``data``: waiting for the loader, and the transfer to the device;
    - ``views``: `ViewAugmentation`, and ``on_after_batch_transfer`` of a module or DataModule;
    - ``network``: ``training_step``, backward, and the hooks of the module;
    - ``optimizer``: optimizer step, gradient clipping, schedules;
    - ``callbacks``: callbacks, including this one;
    - ``trainer``: everything else, i.e. the loops of the Trainer and its loggers.

    Validation is excluded. On CUDA devices, times are measured by events in the current stream, without
    synchronization; on other devices, on the host.

    Logged at the end of each epoch, also to ``callback_metrics``: ``throughput/images_per_s`` (sum over ranks),
    ``step_ms`` per batch and ``<category>_share`` (mean over ranks), ``memory_peak_mib`` (maximum over ranks),
    ``gflops_per_image`` and ``tflops_per_s``; with ``energy=True`` also ``joules_per_image``, ``kwh`` and
    ``co2_g_estimate``. With ``every_n_steps``, loggers also receive the values of rank 0 during the epoch, where
    ``images_per_s`` is multiplied by the number of ranks.

    An image counts once, whatever the number of its views. FLOPs are counted during the first step by torch's
    ``FlopCounterMode`` (matrix products, convolutions and attention, forward and backward, two per multiply-add),
    unless ``torch.compile`` is in use. Memory is the peak of torch's allocator on a CUDA device, else of the process.
    Nothing is stored in checkpoints, since times depend on the machine. For the overhead, see ``docs/throughput.md``.

    Args:
        every_n_steps: Log to the loggers every n training batches; None: at the end of each epoch only.
        warmup: Number of batches at the start of a fit to exclude, >= 0.
        flops: Whether to count the FLOPs of the first step.
        energy: Whether to measure energy with codecarbon (extra ``energy``), in offline mode and without output files.
        grams_per_kwh: CO2 emitted per kWh of electricity, in grams, for ``co2_g_estimate``; None for no estimate. The
            default is the world average of 2024 (Ember, Global Electricity Review 2025).
        name: Prefix of the logged names.

    Attributes:
        summary: Report and advice, set at the end of a fit.
        statistics: Totals of this fit, without the warmup.

    Raises:
        ValueError: If an argument is out of its range.
        ModuleNotFoundError: If ``energy`` is True and codecarbon is not installed.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = 50,
        warmup: int = 1,
        flops: bool = True,
        energy: bool = False,
        grams_per_kwh: float | None = 473.0,
        name: str = "throughput",
    ) -> None:
        if every_n_steps is not None:
            check_at_least("every_n_steps", every_n_steps, 1)
        check_at_least("warmup", warmup, 0)
        if energy:
            check_codecarbon()
        if grams_per_kwh is not None:
            check_not_negative("grams_per_kwh", grams_per_kwh)
        check_word("name", name)
        self.every_n_steps, self.warmup, self.flops = every_n_steps, warmup, flops
        self.energy, self.grams_per_kwh, self.name = energy, grams_per_kwh, name
        self.summary = ""
        self.statistics = StepStatistics()
        self._epoch = StepStatistics()
        self._flop_counter = StepFlopCounter()
        self._flops_of_step: int | None = None
        self._flops_per_image = 0.0
        self._images = self._batches = 0
        self._listener: ProfilerListener | None = None
        self._meter: EnergyMeter | None = None
        self._device = torch.device("cpu")

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``."""
        return f"TrainingCostMonitor[{self.name}]"

    # Hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Reset the statistics.

        Raises:
            ValueError: If the Trainer has another `TrainingCostMonitor`, which would wrap the same profiler.
        """
        if any(isinstance(c, TrainingCostMonitor) and c is not self for c in trainer.callbacks):
            fail("callbacks", "contain one TrainingCostMonitor", "two", "Remove one of them")
        if stage == "fit":
            self.summary, self.statistics, self._epoch = "", StepStatistics(), StepStatistics()
            self._flops_of_step, self._flops_per_image = None, 0.0
            self._images = self._batches = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start listening to the events of the profiler."""
        self._device = trainer.strategy.root_device
        if self.energy and trainer.local_rank == 0:  # codecarbon measures the whole machine
            self._meter = EnergyMeter()
        step_timer = StepTimer(self._new_timer(), self.warmup)
        self._listener = ProfilerListener(trainer, step_timer, self._take_images, self._around_step)
        if isinstance(vars(trainer.strategy).get(HOOK), BatchTransforms):
            BatchTransforms.add(trainer.strategy, self._before_views, first=True)
            BatchTransforms.add(trainer.strategy, self._after_views)
        self._listener.attach()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the images, and log to the loggers every ``every_n_steps`` batches."""
        self._images = count_images(batch)
        self._batches += 1
        if self._flops_of_step is not None and not self._flops_per_image and self._images:
            self._flops_per_image = self._flops_of_step / self._images
        if self.every_n_steps is not None and self._batches % self.every_n_steps == 0:
            recent = self._take()
            self._epoch.add(recent)
            if trainer.loggers and trainer.is_global_zero:
                recent.images *= world_size()
                values = self._named(recent.values())
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the statistics of the epoch over all ranks."""
        if self._listener is None:
            return
        self._listener.step_timer.end_step(self._take_images())
        self._epoch.add(self._take())
        epoch, self._epoch = self._reduced(self._epoch, pl_module.device), StepStatistics()
        self.statistics.add(epoch)
        values = epoch.values() | self.statistics.energy(self.grams_per_kwh)
        log_values(trainer, pl_module, self._named(values), on_epoch=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the summary."""
        self.summary = self.statistics.summary(self.grams_per_kwh, trainer.train_dataloader)
        rank_zero_info(f"{type(self).__name__}: {self.summary}")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the Trainer."""
        self._close(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the Trainer; `teardown` is not called after an exception."""
        self._close(trainer)

    # Measurement.

    def _new_timer(self) -> Timer:
        return CudaTimer(self._device) if self._device.type == "cuda" else Timer()

    def _close(self, trainer: Any) -> None:
        if self._listener is not None:
            self._listener.detach()
            self._listener = None
        if self._meter is not None:
            self._meter.stop()
            self._meter = None
        self._flop_counter.stop()
        BatchTransforms.remove(trainer.strategy, self._before_views)
        BatchTransforms.remove(trainer.strategy, self._after_views)

    def _before_views(self, batch: Any) -> Any:
        if self._listener is not None:
            self._listener.enter(VIEWS)
        return batch

    def _after_views(self, batch: Any) -> Any:
        if self._listener is not None:
            self._listener.leave()
        return batch

    def _around_step(self, starts: bool) -> None:
        """Count the FLOPs of the first step."""
        if starts:
            if self.flops and self._flops_of_step is None and not self._flop_counter.start():
                self._flops_of_step = 0
        elif self._flops_of_step is None:
            self._flops_of_step = self._flop_counter.stop()

    def _take_images(self) -> int:
        images, self._images = self._images, 0
        return images

    def _take(self) -> StepStatistics:
        """Return the statistics of this rank since the last call."""
        assert self._listener is not None
        seconds, images, steps = self._listener.step_timer.take()
        taken = StepStatistics(dict.fromkeys(CATEGORIES, 0.0), images, steps, flops_per_image=self._flops_per_image)
        for name, spent in seconds.items():
            category, _, callback = name.partition("/")
            if category in taken.seconds:
                taken.seconds[category] += spent
            if callback:
                taken.callback_seconds[callback] = spent
        taken.kwh = None if self._meter is None else self._meter.take()
        taken.memory_mib = peak_memory_mib(self._device)
        return taken

    def _reduced(self, own: StepStatistics, device: torch.device) -> StepStatistics:
        """Return the statistics of all ranks; a collective operation."""
        numbers = [own.images, own.steps, own.kwh or 0.0, own.kwh is not None, own.flops_per_image, own.memory_mib]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        row = torch.tensor([[*numbers, *own.seconds.values()]], dtype=dtype, device=device)
        ranks = gather(row, [1] * world_size())  # (ranks, numbers)
        total, largest = ranks.sum(dim=0).tolist(), ranks.max(dim=0).values.tolist()
        seconds = (value / len(ranks) for value in total[len(numbers) :])
        return StepStatistics(
            dict(zip(own.seconds, seconds, strict=True)),
            images=total[0],
            steps=total[1] / len(ranks),
            kwh=total[2] if largest[3] else None,
            flops_per_image=largest[4],
            memory_mib=largest[5],
            callback_seconds=own.callback_seconds,
        )

    def _named(self, values: dict[str, float]) -> dict[str, float]:
        return {f"{self.name}/{key}": value for key, value in values.items()}
