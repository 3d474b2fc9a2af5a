"""What a run costs, as numbers to log and in words."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_contrast.callbacks.throughput.trainer_events import (
    CATEGORIES,
    DATA,
    NETWORK,
    OPTIMIZER,
    PLUGINS,
    TRAINER,
    VIEWS,
)

RAPL = Path("/sys/class/powercap")


IN_WORDS = {
    DATA: "waits for data",
    VIEWS: "makes views",
    NETWORK: "goes forward and backward",
    OPTIMIZER: "belongs to the optimizer",
    PLUGINS: "belongs to the plug-ins",
    TRAINER: "belongs to the Trainer and its loggers",
}
LIMITS = {DATA: 0.15, VIEWS: 0.3, OPTIMIZER: 0.2, PLUGINS: 0.1, TRAINER: 0.15}
"""Share of a step above which there is advice."""
JOULES_PER_KWH = 3.6e6
_LETTERS = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


@dataclass
class Costs:
    """What was spent over a number of steps, all ranks together."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by category, mean over the ranks."""
    images: float = 0.0
    """Images, sum over the ranks."""
    steps: float = 0.0
    """Batches, mean over the ranks."""
    joules: float | None = None
    """Energy, sum over the machines; None where it is not known."""
    flops: float = 0.0
    """Operations for an image; 0 where they were not counted."""
    memory_mib: float = 0.0
    """Most memory of any rank, in MiB."""
    plugins: dict[str, float] = field(default_factory=dict)
    """Seconds of each plug-in on this rank."""
    measured: bool = True
    """Whether the energy was measured and not assumed."""

    @property
    def total(self) -> float:
        """Seconds of all categories."""
        return sum(self.seconds.values())

    def share(self, category: str) -> float:
        """Return a category's share of the time, 0..1."""
        return self.seconds.get(category, 0.0) / self.total if self.total > 0 else 0.0

    def add(self, other: "Costs") -> None:
        """Add what was spent later."""
        for mine, theirs in ((self.seconds, other.seconds), (self.plugins, other.plugins)):
            for name, seconds in theirs.items():
                mine[name] = mine.get(name, 0.0) + seconds
        self.images, self.steps = self.images + other.images, self.steps + other.steps
        if other.joules is not None:
            self.joules = (self.joules or 0.0) + other.joules
        self.flops, self.measured = other.flops or self.flops, other.measured
        self.memory_mib = max(self.memory_mib, other.memory_mib)

    def values(self) -> dict[str, float]:
        """Return the numbers to log, none where no step was timed."""
        if not self.images or self.total <= 0:
            return {}
        rate = self.images / self.total
        found = {"images_per_s": rate, "step_ms": 1000 * self.total / self.steps}
        found |= {f"{category}_share": self.share(category) for category in CATEGORIES}
        found["memory_peak_mib"] = self.memory_mib
        if self.flops:
            found |= {"gflops_per_image": self.flops / 1e9, "tflops_per_s": self.flops * rate / 1e12}
        if self.joules is not None:
            found["joules_per_image"] = self.joules / self.images
        return found

    def energy(self, grams_per_kwh: float | None) -> dict[str, float]:
        """Return the energy to log, and what CO2 it may have cost.

        Args:
            grams_per_kwh: CO2 of the electricity; None: no estimate.
        """
        if self.joules is None:
            return {}
        kwh = self.joules / JOULES_PER_KWH
        return {"kwh": kwh} | ({} if grams_per_kwh is None else {"co2_g_estimate": kwh * grams_per_kwh})

    def words(self, grams_per_kwh: float | None, loader: Any) -> str:
        """Return a report in sentences, with advice.

        Args:
            grams_per_kwh: As for `energy`.
            loader: The training loader, whose workers are counted.
        """
        if not self.images or self.total <= 0:
            return "no step was timed: the fit was shorter than its warm-up."
        parts = sorted(((self.share(category), category) for category in CATEGORIES), reverse=True)
        rate = f"{self.images / self.total:,.0f} images/s, {1000 * self.total / self.steps:,.1f} ms a batch: "
        lines = [rate + ", ".join(f"{share:.0%} {IN_WORDS[name]}" for share, name in parts if share >= 0.005) + "."]
        lines.append(f"Peak memory {self.memory_mib:,.0f} MiB.")
        if self.flops:
            speed = self.flops * self.images / self.total
            lines.append(f"{_scaled(self.flops)}FLOP an image and training step, {_scaled(speed)}FLOP/s.")
        if self.joules is not None:
            energy = self.energy(grams_per_kwh)
            words = f"{energy['kwh']:.3g} kWh ({'measured' if self.measured else 'assumed from the given watts'})"
            if "co2_g_estimate" in energy:
                words += f", an estimated {energy['co2_g_estimate']:.3g} g CO2 at {grams_per_kwh:g} g/kWh"
            lines.append(words + ".")
        return "\n".join([*lines, *(f"- {advice}" for advice in self.advice(loader))])

    def advice(self, loader: Any) -> list[str]:
        """Return what to try, the largest share first.

        Args:
            loader: As for `words`.
        """
        large = sorted(((self.share(c), c) for c, limit in LIMITS.items() if self.share(c) > limit), reverse=True)
        found = [f"{share:.0%} of the step {IN_WORDS[name]}: {self._mend(name, loader)}." for share, name in large]
        if not found:
            share = self.share(NETWORK)
            hint = "a lower precision (`bf16-mixed`), `torch.compile` or a smaller network would make it faster"
            found.append(f"{share:.0%} of the step {IN_WORDS[NETWORK]}, as it should be: {hint}.")
        return found

    def _mend(self, category: str, loader: Any) -> str:
        if category == DATA:
            workers = f" (`num_workers` is {loader.num_workers})" if isinstance(loader, DataLoader) else ""
            return f"more workers{workers}, or `ImageDataModule` or `InMemoryDataModule`, which hold a set in memory"
        if category == PLUGINS:
            spent = sorted(self.plugins.items(), key=lambda item: -item[1])[:3]
            names = ", ".join(f"{name} {seconds / self.total:.1%}" for name, seconds in spent)
            return f"{names}; let them look less often"
        return {
            VIEWS: "smaller views, fewer operations, or the fused policies of `augment` on the device of the network",
            OPTIMIZER: "a larger batch or `accumulate_grad_batches`, and `fused=True` where the optimizer has it",
            TRAINER: "a larger batch, or a larger `log_every_n_steps`",
        }[category]


def _scaled(number: float) -> str:
    """Return a number with the letter of its thousands, so that a unit can follow."""
    letter = next((letter for letter, size in _LETTERS.items() if number >= size), "")
    return f"{number / _LETTERS.get(letter, 1.0):.3g} {letter}"


class EnergyMeter:
    """Adds up the energy of this machine's processors, and of the GPU of this process.

    Processors: the RAPL counters of the packages and of their memory in ``/sys/class/powercap``, which Linux lets root
    read, for all that the machine does. GPU: the power that NVML tells (needs ``nvidia-ml-py``) at each reading, times
    the time since the last one. Where neither can be read, ``watts`` times the time.

    Args:
        device: Of this process.
        watts: Power to assume where nothing can be measured; None: then there is no energy.
        processors: Whether this process is the one of its machine that reads the processors.
        root: Where the counters are.
        clock: Gives seconds.
    """

    def __init__(
        self,
        device: torch.device,
        watts: float | None = None,
        *,
        processors: bool = True,
        root: Path = RAPL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._time = clock, clock()
        self._device = device if device.type == "cuda" and _power(device) is not None else None
        zones = [zone for zone in sorted(root.glob("*-rapl:*")) if _is_counted(zone)] if processors else []
        self._zones = {zone: joules for zone in zones if (joules := _joules(zone)) is not None}
        self.sources = [f"{_text(zone / 'name')} (RAPL)" for zone in self._zones]
        self.sources += ["GPU (NVML)"] if self._device else []
        self._watts = None if self.sources else watts

    @property
    def measured(self) -> bool:
        """Whether anything is measured and not assumed."""
        return bool(self.sources)

    def take(self) -> float | None:
        """Return the joules since the last call, None where they are not known."""
        if not self.measured and self._watts is None:
            return None
        now = self._clock()
        seconds, self._time = now - self._time, now
        total = (self._watts or 0.0) * seconds
        for zone, before in self._zones.items():
            after = _joules(zone)
            if after is None:
                continue
            turned = _joules(zone, "max_energy_range_uj") or 0.0 if after < before else 0.0
            self._zones[zone] = after
            total += after - before + turned
        if self._device is not None:
            total += (_power(self._device) or 0.0) * seconds
        return total


def _is_counted(zone: Path) -> bool:
    """Tell whether a zone is a whole package or its memory: cores and graphics are parts of the package."""
    return (_text(zone / "name") or "").startswith(("package", "dram"))


def _joules(zone: Path, name: str = "energy_uj") -> float | None:
    text = _text(zone / name)
    return float(text) / 1e6 if text else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _power(device: torch.device) -> float | None:
    """Return the watts of a GPU, None where they cannot be read."""
    try:
        return torch.cuda.power_draw(device) / 1000
    except Exception:  # noqa: BLE001  (NVML's error is of a package that may be missing)
        return None


class _NoModules:
    """Stands for the counter's tracker of modules, which would hook every module and tensor of the process."""

    parents = ("Global",)

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *_: object) -> None:
        """Do nothing."""


class StepFlops:
    """Counts with `torch.utils.flop_counter` what runs between `begin` and `end`: no operation more, none less.

    The counter reads the shapes of the operations of the real step, so nothing is computed twice and no random number
    is drawn. Counted are matrix products, convolutions and attention, a multiplication and an addition as two; what a
    checkpointed layer computes again counts again.
    """

    def __init__(self) -> None:
        self._mode: Any = None

    def begin(self) -> bool:
        """Begin to count, and tell whether that is possible: compiled code would not run compiled under a counter."""
        if _compiles():
            return False
        self._mode = FlopCounterMode(display=False)
        self._mode.mod_tracker = _NoModules()
        self._mode.__enter__()
        return True

    def end(self) -> int:
        """Return the operations since `begin`; 0 where nothing was counted."""
        mode, self._mode = self._mode, None
        if mode is None:
            return 0
        mode.__exit__(None, None, None)
        return int(mode.get_total_flops())


def _compiles() -> bool:
    """Tell whether anything in this process was given to ``torch.compile``."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    backends: dict[int, Any] = getattr(frames, "cached_backends", {})
    return any(backend is not None for backend in backends.values())  # None: of code that must not be compiled
