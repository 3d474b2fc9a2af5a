"""Timing of several candidates side by side in one run, and the record of the machine that ran it."""

import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "kornia", "torchvision", "lightly", "timm", "pytorch-metric-learning", "litdata")


def machine() -> dict[str, Any]:
    """Return what a reader needs to judge a figure: processor, cores, threads, versions, date."""
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = f"{names[0]}, {len(names)} cores" if names else platform.processor()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": date.today().isoformat(),
        "processor": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def alternate(
    candidates: dict[str, Callable[[], object]], *, repeats: int = 5, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Time each candidate in turn, round after round, so that a drift of the machine meets all of them.

    Args:
        candidates: What to call, by the name to print.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.

    Returns:
        For each name the median, minimum and maximum of the wall-clock seconds of a call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {
        name: {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}
        for name, values in seconds.items()
    }


def count_launches(call: Callable[[], object]) -> int:
    """Return how many kernels ``call`` dispatches; operations that only view or allocate memory do not count.

    Needs no accelerator: on tensors of the CPU the same operations are dispatched. What the call computes on the host
    counts as well, such as draws of random numbers.
    """
    launches = _Launches()
    with launches:
        call()
    return launches.count


class _Launches(TorchDispatchMode):
    """Counts the operations that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name == "_unsafe_view" or "empty" in name)
        return func(*args, **(kwargs or {}))


def peak_memory_mib(module: str, *arguments: str) -> float:
    """Run ``python -m module arguments`` in a fresh process and return what it prints last: its peak in MiB.

    The child prints the growth of its peak resident memory (see `memory_growth_mib`) as its last line.
    """
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def memory_growth_mib(call: Callable[[], object]) -> float:
    """Return by how many MiB ``call`` raises the peak resident memory of this program.

    Read from the kernel's high-water mark: `resource.getrusage` would count what the parent held before the exec.
    """
    before = _high_water_mib()
    call()
    return _high_water_mib() - before


def _high_water_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def report(name: str, rows: list[dict[str, Any]], notes: str = "") -> None:
    """Print rows as a Markdown table and write them with the machine to ``benchmarks/results/<name>.json``.

    Args:
        name: Name of the benchmark, and of its file.
        rows: One dict a line of the table, all with the same keys in the same order.
        notes: What was timed, in a sentence or two.
    """
    columns = list(rows[0])
    print(f"\n## {name}\n\n{notes}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(cells) + " |")
    RESULTS.mkdir(exist_ok=True)
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    record = {"name": name, "notes": notes, "command": command, "machine": machine()}
    (RESULTS / f"{name}.json").write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
