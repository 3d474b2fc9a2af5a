"""Watches whether the features of a run collapse, and says in words how and why."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, check_word, fail
from lightning_contrast.callbacks.collapse.diagnosis import Finding, Record, Thresholds, diagnose
from lightning_contrast.callbacks.collapse.measurements import RollingBuffer, measure_buffer
from lightning_contrast.callbacks.collapse.model_facts import read_facts
from lightning_contrast.callbacks.collapse.observer import Recorder
from lightning_contrast.callbacks.reporting import draw_spectra, log_values
from lightning_contrast.distributed import all_reduce_mean

WINDOW = 8
"""Batches that a measurement is taken from."""
_UNLOGGED = ("width", "rows", "possible")
COURSE = 512
"""Measurements kept; of a longer course the first is kept, and the newest."""


class CollapseMonitor(L.Callback):
    """Measures features and projections every ``every_n_steps`` training batches, and names what is wrong with them.

    It works on any LightningModule, under `lightning` and `pytorch_lightning`, with automatic or manual optimization,
    on every strategy, and leaves the run as it was, bit for bit: hooks copy what the step computed, there is no further
    forward pass, no random number is drawn, nothing is added to the module.

    A measurement is taken from the last 8 batches, ``samples`` images over all ranks; in all other batches the hooks do
    nothing. The first one comes after 8 batches: alarms judge the course since then. Logged: ``collapse/<number>`` for
    the features and ``collapse/projections/<number>`` for the projections (``std``, ``mean_cosine``, ``rankme``,
    ``effective_rank``, ``participation_ratio``, ``alpha_req``, ``uniformity``, ``dead``, ``within``, ``norm``,
    ``scale``, ``finite``; with two views ``alignment``, ``positive_cosine``, ``margin``); ``collapse/teacher/...``
    where the projector has a momentum copy, ``collapse/scores/...`` where a module has prototypes or a
    ``teacher_temperature``, ``collapse/queue/staleness_cosine`` with a `MemoryBank`. What each means, the thresholds
    and the measured runs behind them: ``docs/collapse.md``. The singular spectra of the first and the last measurement
    are drawn at an alarm and at the end, for loggers that take figures (matplotlib).

    An alarm is given once for each kind and space: a warning with the evidence and what to try, an entry in
    ``findings``, and a snapshot.

    Memory: ``samples`` rows of features and of at most two views of projections and teacher's projections each. A
    checkpoint has them too while a measurement is being collected, so that a resumed run measures the same. Cost: see
    ``docs/collapse.md``; the host waits for the device at a measurement only.

    Args:
        features: As for `OnlineLinearProbe`.
        projections: Name of the submodule whose output the loss acts on; "auto" takes "projector" or
            "projection_head" where there is one; None judges the features alone.
        every_n_steps: Training batches from one measurement to the next. None measures at the end of each validation.
        samples: Images of a measurement, over all ranks; ranks cannot be above it.
        action: "warn", or "stop" to end the run at the first alarm.
        snapshot_dir: Where the evidence of an alarm is written, ``collapse_step<step>.pt`` with numbers, spectra and
            rows. None: the logger's folder, or ``default_root_dir`` without one.
        name: First part of the names that are logged.
        tokens: As for `OnlineLinearProbe`.
        thresholds: When to give an alarm; None takes the defaults of ``Thresholds``.

    Attributes:
        course: The measurements of this fit, oldest first.
        findings: What was named in this fit.
    """

    def __init__(
        self,
        features: str = "backbone",
        *,
        projections: str | None = "auto",
        every_n_steps: int | None = 100,
        samples: int = 1024,
        action: str = "warn",
        snapshot_dir: str | Path | None = None,
        name: str = "collapse",
        tokens: str = "mean",
        thresholds: Thresholds | None = None,
    ) -> None:
        if every_n_steps is not None:
            check_at_least("every_n_steps", every_n_steps, 1)
        check_at_least("samples", samples, 16)
        check_choice("action", action, ("warn", "stop"))
        check_word("name", name)
        if not (projections is None or isinstance(projections, str)):
            hint = 'Give the name of a submodule, "auto" or None'
            fail("projections", "be a name or None", type(projections).__name__, hint, TypeError)
        self.every_n_steps, self.action, self.name = every_n_steps, action, name
        self.snapshot_dir, self.thresholds = snapshot_dir, thresholds or Thresholds()
        self.course: list[Record] = []
        self.findings: list[Finding] = []
        self._observer = Recorder(features, projections, tokens, -(-samples // WINDOW))
        self._reservoir = RollingBuffer(WINDOW)
        self._batches = 0
        self._named: set[str] = set()
        self._armed = False
        self._loss: Tensor | None = None
        self._first_spectra: dict[str, Tensor] = {}
        self._spectra: dict[str, Tensor] = {}
        self._pending: list[list[dict[str, Tensor]]] | None = None

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``."""
        return f"CollapseMonitor[{self.name}]"

    # The hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin a new course; that of a checkpoint is loaded after this."""
        if stage == "fit":
            self._reservoir.clear()
            self.course, self.findings, self._named, self._batches = [], [], set(), 0
            self._first_spectra, self._spectra, self._pending, self._armed = {}, {}, None, False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers: here they exist, wrapped as they will be, in every strategy."""
        self._observer.attach(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Expect the features of a batch that is part of a measurement."""
        if self._pending is not None:
            self._reservoir.restore(self._pending, pl_module.device)
            self._pending = None
        every = self.every_n_steps
        self._armed = every is None or self._batches < WINDOW or self._batches % every >= every - WINDOW
        if self._armed:
            self._observer.expect(pl_module, batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the rows of the batch, and measure where it is time."""
        self._batches += 1
        if not self._armed:
            return
        self._armed = False
        with torch.no_grad():
            self._reservoir.add(self._observer.collect(pl_module, outputs))
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self._loss = loss.detach().float().mean() if isinstance(loss, Tensor) else None
            every = self.every_n_steps
            if every is not None and (self._batches % every == 0 or self._batches == min(WINDOW, every)):
                self._measure(trainer, pl_module, on_epoch=False)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, with ``every_n_steps=None``."""
        if self.every_n_steps is None and not trainer.sanity_checking and len(self._reservoir) > 0:
            with torch.no_grad():
                self._measure(trainer, pl_module, on_epoch=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the spectra."""
        draw_spectra(trainer, self.name, self._first_spectra, self._spectra)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks away."""
        self._observer.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks away: `teardown` is not called after an exception."""
        self._observer.detach()

    # A checkpoint.

    def state_dict(self) -> dict[str, Any]:
        """Return the course, the spectra, and the rows of all ranks that a measurement waits for."""
        return {
            "batches": self._batches,
            "course": [dict(record) for record in self.course],
            "named": sorted(self._named),
            "first_spectra": dict(self._first_spectra),
            "spectra": dict(self._spectra),
            "reservoir": self._reservoir.state() if self._pending is None else self._pending,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; the rows wait until the device is known."""
        self._batches, self.course = state_dict["batches"], state_dict["course"]
        self._named = set(state_dict["named"])
        self._first_spectra, self._spectra = state_dict["first_spectra"], state_dict["spectra"]
        self._pending = state_dict["reservoir"]

    # A measurement.

    def _measure(self, trainer: Any, pl_module: Any, *, on_epoch: bool) -> None:
        """Measure on all ranks alike, log, and name what is wrong."""
        record, spectra, rows = measure_buffer(self._reservoir)
        if self.every_n_steps is not None:
            self._reservoir.clear()
        record["step"] = int(trainer.global_step)
        if self._loss is not None:
            record["loss"] = float(all_reduce_mean(self._loss))
        self.course.append(record)
        if len(self.course) > COURSE:
            del self.course[1]
        self._spectra = spectra
        self._first_spectra = self._first_spectra or spectra
        log_values(trainer, pl_module, self._flat(record), on_epoch=on_epoch)
        facts = read_facts(trainer, pl_module)
        found = [f for f in diagnose(self.course, facts, self.thresholds) if f"{f.kind}/{f.space}" not in self._named]
        if found:
            self._alarm(trainer, found, record, rows)

    def _flat(self, record: Record) -> dict[str, float]:
        """Return the numbers of a measurement by the names that are logged."""
        values: dict[str, float] = {}
        for space, numbers in record.items():
            if isinstance(numbers, dict):
                middle = "" if space == "features" else f"{space}/"
                kept = {key: value for key, value in numbers.items() if key not in _UNLOGGED and not math.isnan(value)}
                values |= {f"{self.name}/{middle}{key}": value for key, value in kept.items()}
        return values

    def _alarm(self, trainer: Any, found: list[Finding], record: Record, rows: dict[str, Tensor]) -> None:
        self.findings += found
        self._named |= {f"{f.kind}/{f.space}" for f in found}
        path = self._save(trainer, record, rows) if trainer.is_global_zero else ""
        words = "\n".join(f"- {finding}" for finding in found)
        stops = " The run stops here." if self.action == "stop" else ""
        rank_zero_warn(f"{type(self).__name__}:{stops}\n{words}\nEvidence: {path}")
        draw_spectra(trainer, self.name, self._first_spectra, self._spectra)
        if self.action == "stop":
            trainer.should_stop = True  # on all ranks, which measured the same rows

    def _save(self, trainer: Any, record: Record, rows: dict[str, Tensor]) -> Path:
        """Write the evidence and return where it lies."""
        folder = Path(self.snapshot_dir or getattr(trainer.logger, "log_dir", None) or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name.replace('/', '_')}_step{record['step']}.pt"
        evidence = {
            "findings": [str(finding) for finding in self.findings],
            "course": self.course,
            "first_spectra": self._first_spectra,
            "spectra": self._spectra,
            "rows": {name: value.cpu().clone() for name, value in rows.items()},  # without the other view
        }
        torch.save(evidence, path)
        return path
