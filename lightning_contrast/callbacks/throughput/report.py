"""Statistics of training steps as values to log, and as a summary with advice."""

from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.throughput import Throughput
from torch.utils.data import DataLoader

from lightning_contrast.callbacks.throughput.trainer_events import (
    CALLBACKS,
    CATEGORIES,
    DATA,
    NETWORK,
    OPTIMIZER,
    TRAINER,
    VIEWS,
)

DESCRIPTIONS = {
    DATA: "waiting for data",
    VIEWS: "view augmentation",
    NETWORK: "forward and backward",
    OPTIMIZER: "optimizer",
    CALLBACKS: "callbacks",
    TRAINER: "Trainer and loggers",
}
LIMITS = {DATA: 0.15, VIEWS: 0.3, OPTIMIZER: 0.2, CALLBACKS: 0.1, TRAINER: 0.15}
"""Share of the step time above which the summary gives advice."""
_PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


@dataclass
class StepStatistics:
    """Totals over a number of training steps on all ranks."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds per category, mean over ranks."""
    images: float = 0.0
    """Number of images, sum over ranks."""
    steps: float = 0.0
    """Number of batches, mean over ranks."""
    kwh: float | None = None
    """Energy in kWh, sum over machines; None if it is not measured."""
    flops_per_image: float = 0.0
    """FLOPs of one image; 0 if they were not counted."""
    memory_mib: float = 0.0
    """Peak memory in MiB, maximum over ranks."""
    callback_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds per callback class on this rank."""

    @property
    def total_seconds(self) -> float:
        """Seconds of all categories."""
        return sum(self.seconds.values())

    def share(self, category: str) -> float:
        """Return the share of the step time spent in a category, 0..1."""
        return self.seconds.get(category, 0.0) / self.total_seconds if self.total_seconds > 0 else 0.0

    def add(self, other: "StepStatistics") -> None:
        """Add the totals of later steps."""
        for own, added in ((self.seconds, other.seconds), (self.callback_seconds, other.callback_seconds)):
            for name, seconds in added.items():
                own[name] = own.get(name, 0.0) + seconds
        self.images, self.steps = self.images + other.images, self.steps + other.steps
        if other.kwh is not None:
            self.kwh = (self.kwh or 0.0) + other.kwh
        self.flops_per_image = other.flops_per_image or self.flops_per_image
        self.memory_mib = max(self.memory_mib, other.memory_mib)

    def rates(self) -> dict[str, float]:
        """Return batches, samples and FLOPs per second from Lightning's `Throughput`, empty if no step was timed."""
        if not self.images or not self.steps or self.total_seconds <= 0:
            return {}
        throughput: Any = Throughput(window_size=2)  # rates between two updates: those of all steps in between
        throughput.update(time=0.0, batches=0, samples=0, flops=0)
        flops = self.flops_per_image * self.images
        throughput.update(time=self.total_seconds, batches=self.steps, samples=self.images, flops=flops)
        rates: dict[str, float] = throughput.compute()
        return {name.removeprefix("device/"): rate for name, rate in rates.items() if name.startswith("device/")}

    def values(self) -> dict[str, float]:
        """Return the values to log, empty if no step was timed."""
        rates = self.rates()
        if not rates:
            return {}
        values = {"images_per_s": rates["samples_per_sec"], "step_ms": 1000 / rates["batches_per_sec"]}
        values |= {f"{category}_share": self.share(category) for category in CATEGORIES}
        values["memory_peak_mib"] = self.memory_mib
        if self.flops_per_image:
            values |= {"gflops_per_image": self.flops_per_image / 1e9, "tflops_per_s": rates["flops_per_sec"] / 1e12}
        if self.kwh is not None:
            values["joules_per_image"] = 3.6e6 * self.kwh / self.images
        return values

    def energy(self, grams_per_kwh: float | None) -> dict[str, float]:
        """Return energy and estimated emissions, empty if energy is not measured.

        Args:
            grams_per_kwh: CO2 emitted per kWh of electricity; None for no estimate.
        """
        if self.kwh is None:
            return {}
        return {"kwh": self.kwh} | ({} if grams_per_kwh is None else {"co2_g_estimate": self.kwh * grams_per_kwh})

    def summary(self, grams_per_kwh: float | None, loader: Any) -> str:
        """Return a report with advice.

        Args:
            grams_per_kwh: As for `energy`.
            loader: The training loader; its ``num_workers`` is part of the advice.
        """
        rates = self.rates()
        if not rates:
            return "no step was timed: the fit was not longer than `warmup`."
        parts = sorted(((self.share(category), category) for category in CATEGORIES), reverse=True)
        rate = f"{rates['samples_per_sec']:,.0f} images/s, {1000 / rates['batches_per_sec']:,.1f} ms per batch: "
        lines = [rate + ", ".join(f"{share:.0%} {DESCRIPTIONS[name]}" for share, name in parts if share >= 0.005) + "."]
        lines.append(f"Peak memory {self.memory_mib:,.0f} MiB.")
        if self.flops_per_image:
            speed = rates["flops_per_sec"]
            lines.append(f"{_scaled(self.flops_per_image)}FLOP per image and training step, {_scaled(speed)}FLOP/s.")
        if self.kwh is not None:
            energy = self.energy(grams_per_kwh)
            text = f"{energy['kwh']:.3g} kWh"
            if "co2_g_estimate" in energy:
                text += f", an estimated {energy['co2_g_estimate']:.3g} g CO2 at {grams_per_kwh:g} g/kWh"
            lines.append(text + ".")
        return "\n".join([*lines, *(f"- {advice}" for advice in self.advice(loader))])

    def advice(self, loader: Any) -> list[str]:
        """Return advice for each category above its limit, largest share first.

        Args:
            loader: As for `summary`.
        """
        large = sorted(((self.share(c), c) for c, limit in LIMITS.items() if self.share(c) > limit), reverse=True)
        found = [f"{share:.0%} {DESCRIPTIONS[name]}: try {self._hint(name, loader)}." for share, name in large]
        if not found:
            hint = "to speed it up, try a lower precision (`bf16-mixed`), `torch.compile` or a smaller network"
            found.append(f"{self.share(NETWORK):.0%} {DESCRIPTIONS[NETWORK]}: no bottleneck elsewhere; {hint}.")
        return found

    def _hint(self, category: str, loader: Any) -> str:
        if category == DATA:
            workers = f" (`num_workers` is {loader.num_workers})" if isinstance(loader, DataLoader) else ""
            return f"more workers{workers}, or `ImageDataModule` or `InMemoryDataModule`, which keep the data in memory"
        if category == CALLBACKS:
            largest = sorted(self.callback_seconds.items(), key=lambda item: -item[1])[:3]
            names = ", ".join(f"{name} {seconds / self.total_seconds:.1%}" for name, seconds in largest)
            return f"running callbacks less often ({names})"
        return {
            VIEWS: "smaller views, fewer operations, or the fused policies of `augment` on the device of the network",
            OPTIMIZER: "a larger batch or `accumulate_grad_batches`, and `fused=True` if the optimizer supports it",
            TRAINER: "a larger batch, or a larger `log_every_n_steps`",
        }[category]


def _scaled(number: float) -> str:
    """Return a number with an SI prefix, to be followed by its unit."""
    prefix = next((prefix for prefix, size in _PREFIXES.items() if number >= size), "")
    return f"{number / _PREFIXES.get(prefix, 1.0):.3g} {prefix}"
