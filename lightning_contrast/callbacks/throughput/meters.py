"""FLOPs, energy and peak memory of training."""

import contextlib
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_EXTRA = "pip install 'lightning_contrast[energy]'"


class StepFlopCounter:
    """FLOP counter of one training step, based on `torch.utils.flop_counter.FlopCounterMode`.

    The counter reads the shapes of the operations of the real step: nothing is computed twice and no random number is
    drawn. It counts matrix products, convolutions and attention, two FLOPs per multiply-add; layers recomputed by
    activation checkpointing count twice. Lightning's ``measure_flops`` uses the same mode around an additional forward
    and backward pass.
    """

    def __init__(self) -> None:
        self._mode: Any = None

    def start(self) -> bool:
        """Start counting; return False if code is compiled, since compiled code is not run under a dispatch mode."""
        if _uses_compile():
            return False
        self._mode = FlopCounterMode(display=False)
        # The default tracker adds hooks to all modules and tensors of the process.
        self._mode.mod_tracker = _NoModuleTracker()
        self._mode.__enter__()
        return True

    def stop(self) -> int:
        """Stop and return the FLOPs since `start`, 0 if nothing was counted."""
        mode, self._mode = self._mode, None
        if mode is None:
            return 0
        mode.__exit__(None, None, None)
        return int(mode.get_total_flops())


class _NoModuleTracker(contextlib.nullcontext[None]):
    """Attributes all operations to the whole model."""

    parents = ("Global",)


def _uses_compile() -> bool:
    """Return whether ``torch.compile`` was applied to anything in this process."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    backends: dict[int, Any] = getattr(frames, "cached_backends", {})
    return any(backend is not None for backend in backends.values())  # None: `torch.compiler.disable`


def check_codecarbon() -> None:
    """Check that codecarbon is installed.

    Raises:
        ModuleNotFoundError: If it is not; names the extra to install.
    """
    if find_spec("codecarbon") is None:
        raise ModuleNotFoundError(f"`energy=True` needs codecarbon, which is not installed. Run {_EXTRA}.")


class EnergyMeter:
    """Energy of this machine since the start of training, measured by codecarbon in offline mode.

    codecarbon reads RAPL and NVML counters, and estimates the power of components without a counter. It opens no
    network connection and writes no file.
    """

    def __init__(self) -> None:
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.output import BaseOutput

        self._total_kwh: float | None = None
        self._taken_kwh = 0.0
        meter = self

        class Receiver(BaseOutput):  # type: ignore[misc]
            def out(self, total: Any, delta: Any) -> None:
                meter._total_kwh = float(total.energy_consumed)

        logging.getLogger("codecarbon").setLevel(logging.ERROR)  # it logs before it reads `log_level`
        self._tracker: Any = OfflineEmissionsTracker(
            country_iso_code="USA",  # required; only the energy is used, not the emissions
            tracking_mode="machine",
            output_methods=[],
            output_handlers=[Receiver()],
            emissions_endpoint=None,
            allow_multiple_runs=True,
            log_level="error",
        )
        self._tracker.start()

    def take(self) -> float | None:
        """Return the energy in kWh since the last call, None if codecarbon failed to measure it."""
        self._tracker.flush()
        if self._total_kwh is None:
            return None
        taken, self._taken_kwh = self._total_kwh - self._taken_kwh, self._total_kwh
        return taken

    def stop(self) -> None:
        """Stop the background threads of codecarbon."""
        self._tracker.stop()


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of torch's allocator on a CUDA device, else of this process.

    Args:
        device: Device of the run.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the peak of the parent process before exec
        lines = (line.split() for line in status.read_text().splitlines())
        return next(float(words[1]) for words in lines if words and words[0] == "VmHWM:") / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes where there is no /proc (macOS)
