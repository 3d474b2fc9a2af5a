"""The matrix: each method under each condition is a cell, which marked tests fill, and a run makes a page of them.

A test marked ``matrix("a condition")`` and parametrized by ``name``, a case of tests/methods/cases.py, belongs to the
cell of that condition and of the case's method (the first word of its name). A cell is green when all its tests pass.
"""

import datetime
import os
import platform
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import lightning_contrast as lc

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
METHODS = [name for name in lc.methods.__all__ if name != "SelfSupervisedModule"]

CONDITIONS = {
    "fit": "A run on one process; every trainable parameter gets a gradient, the step gives loss and features.",
    "DDP": "Two processes equal one on the joined batch: losses, gradients of every step, final weights (float64 to "
    "1e-9, float32 to 1e-5). Without BatchNorm, whose `SyncBatchNorm` refuses CPUs.",
    "FSDP1": "Two processes that shard everything (once around the whole module, once around inner layers too) end "
    "with the weights of DDP; full and sharded checkpoints load back, and the resumed run equals the one that went on.",
    "FSDP2": "The same with `ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)`; every parameter is "
    "a DTensor of which a rank holds its share.",
    "LARS, clipped, FSDP1": "LARS and gradients clipped by their common norm give the weights of DDP, though no rank "
    "sees a whole gradient.",
    "LARS, clipped, FSDP2": "The same under FSDP2.",
    "bf16-mixed": "A run in `bf16-mixed`: finite, stepping, losses and momentum networks in float32.",
    "accumulated, clipped": "`accumulate_grad_batches=2` with clipping: the optimizer sees the mean of both gradients, "
    "clipped once; momentum networks and schedules move once an optimizer step.",
    "activation checkpointing": "The backbone's layers are computed twice (`nn.checkpoint_activations`): same weights, "
    "BatchNorm's averages move once, a probe on an inner layer sees each step once.",
    "resume, epoch end": "A run that was stopped and resumed equals one that was not, bit for bit: weights, momentum "
    "networks, queues, centers, optimizer, schedules, a probe.",
    "resume, mid-epoch": "The same from the middle of an epoch.",
    "checkpoint": "Loads with `weights_only=True` and holds no modules; where the backbone is a name, "
    "`load_from_checkpoint(path)` needs no arguments.",
    "torch.compile": "`fit(torch.compile(module))` ends with the same weights (1e-5): backend aot_eager for every "
    "method, inductor for SimCLR, BYOL and MoCo.",
    "second fit": "`fit` twice, and `fit`, `validate`, `fit`: equal weights, and callbacks that continue.",
    "copied": "`deepcopy` and `pickle` after a fit give the same module, that trains on.",
    "watched": "A linear probe, k-NN, `CollapseMonitor`, `TrainingCostMonitor`, `InvarianceMonitor`, `ViewLogger`, "
    "`EmbeddingLogger` and (where a step has two views of a projection) `InstanceDiscriminationMonitor` at once change "
    "nothing in a run.",
    "exported": "`export.export`: the weights load strictly into a fresh network of the same kind, the ONNX graph "
    "gives the same features (1e-4) for any batch size; both carry the input's size, mean and std.",
}

_UNATTACKED = (
    "an attack needs the gradient of images within a step, which FSDP1 cannot compute; RoCL refuses it by name"
)
NOT_APPLICABLE: dict[tuple[str, str], str] = {
    ("RoCL", "FSDP1"): _UNATTACKED,
    ("RoCL", "LARS, clipped, FSDP1"): _UNATTACKED,
}
"""Reasons, by method and condition, that a user would accept."""


def not_applicable(method: str, condition: str) -> str | None:
    """Return why a cell does not apply, or None."""
    return NOT_APPLICABLE.get((method, condition))


def method_of(case: str) -> str:
    """Return the method of a case: "MoCo split" is one of MoCo's."""
    return case.split(maxsplit=1)[0]


def declared(module) -> set[tuple[str, str]]:
    """Return the cells for which a test module has tests, without running them."""
    cells = set()
    for test in vars(module).values():
        marks = getattr(test, "pytestmark", [])
        parameters = [mark for mark in marks if mark.name == "parametrize"]
        conditions = [mark.args[0] for mark in marks if mark.name == "matrix"]
        sets = (values for _, values in (mark.args for mark in parameters))
        of_values = (mark for values in sets for value in values for mark in getattr(value, "marks", ()))
        conditions += [mark.args[0] for mark in of_values if mark.name == "matrix"]
        cases = (mark.args[1] for mark in parameters if mark.args[0] == "name")
        cells |= {(method_of(case), condition) for names in cases for case in names for condition in conditions}
    return cells


@dataclass
class Cell:
    """What the tests of a method under a condition came to."""

    passed: int = 0
    failed: int = 0
    skipped: list[str] = field(default_factory=list)

    def text(self, footnotes: dict[str, int]) -> str:
        """Return green, red or a reference to the reason."""
        if self.failed:
            return "**red**"
        if self.skipped:
            return " ".join(f"n/a [{footnotes.setdefault(why, len(footnotes) + 1)}]" for why in sorted({*self.skipped}))
        return "green" if self.passed else "**red**"


class Matrix:
    """A pytest plugin that skips cells that do not apply and collects the results of the others."""

    def __init__(self, page: Path | None) -> None:
        self.page = page
        self.cells: dict[tuple[str, str], Cell] = defaultdict(Cell)
        self.seconds: dict[str, float] = defaultdict(float)
        self.problem: str | None = None

    def pytest_collection_modifyitems(self, items):
        for item in items:
            for mark in item.iter_markers("matrix"):
                cell = method_of(item.callspec.params["name"]), mark.args[0]
                if cell[0] not in METHODS or cell[1] not in CONDITIONS:
                    raise pytest.UsageError(f"{item.nodeid}: the matrix has no cell {cell}")
                item.user_properties.append(("matrix", cell))
                reason = not_applicable(*cell)
                if reason is not None:
                    item.add_marker(pytest.mark.skip(reason=reason))

    def pytest_runtest_logreport(self, report):
        for name, key in report.user_properties:
            if name != "matrix":
                continue
            cell = self.cells[tuple(key)]
            self.seconds[key[1]] += report.duration
            if report.failed:
                cell.failed += 1
            elif report.skipped:
                cell.skipped.append(report.longrepr[2].removeprefix("Skipped: "))
            elif report.when == "call":
                cell.passed += 1

    def pytest_sessionfinish(self, session):
        if self.page is None:
            return
        try:
            self.page.write_text(render(self.cells, self.seconds))
        except ValueError as error:
            self.problem, session.exitstatus = str(error), pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.problem is not None:
            terminalreporter.write_line(self.problem, red=True)
        elif self.page is not None:
            terminalreporter.write_line(self.page.read_text())


def render(cells: dict[tuple[str, str], Cell], seconds: dict[str, float]) -> str:
    """Return the page of a run; a cell without a test is a ValueError."""
    absent = [f"{m} x {c}" for m in METHODS for c in CONDITIONS if (m, c) not in cells]
    if absent:
        raise ValueError(f"No test ran for {len(absent)} cells of the matrix: {'; '.join(absent[:20])}")
    footnotes: dict[str, int] = {}
    columns = list(CONDITIONS)
    rows = [[f"`{m}`", *(cells[m, c].text(footnotes) for c in columns)] for m in METHODS]
    texts = [text for row in rows for text in row[1:]]
    counts = {
        "green": texts.count("green"),
        "red": texts.count("**red**"),
        "not applicable": sum(text.startswith("n/a") for text in texts),
    }
    tests = sum(cell.passed + cell.failed + len(cell.skipped) for cell in cells.values())
    lines = [
        "# Every method under every condition",
        "",
        "Made by `make matrix`, which runs the tests of all cells; `make test` runs the same tests. A cell is green "
        "when all of its tests pass.",
        "",
        f"Run on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}: {tests} tests, "
        f"{sum(seconds.values()):.0f} s; {', '.join(f'{count} cells {what}' for what, count in counts.items())}. "
        "Small networks, gloo on a CPU.",
        "",
        _line(["method", *columns]),
        _line(["---"] * (len(columns) + 1)),
        *map(_line, rows),
        "",
    ]
    if footnotes:
        lines += ["Not applicable:", "", *(f"{number}. {reason}" for reason, number in footnotes.items()), ""]
    lines += ["## What each condition asks", "", _line(["condition", "asks", "seconds"]), _line(["---", "---", "---:"])]
    lines += [_line([c, CONDITIONS[c], f"{seconds[c]:.0f}"]) for c in columns]
    return "\n".join(lines) + "\n"


def _line(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


def machine() -> str:
    """Return what the run ran on."""
    import lightning
    import torch

    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} x {cpu}, torch {torch.__version__.split('+')[0]}, lightning {lightning.__version__}"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
