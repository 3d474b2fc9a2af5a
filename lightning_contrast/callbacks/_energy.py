"""Energy that a run takes, from the counters of the processor where they can be read, or from a power that is given."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


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
