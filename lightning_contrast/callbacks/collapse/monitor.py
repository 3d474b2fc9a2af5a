"""Collapse of the features and projections of a run: measurements, alarms and likely causes."""

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
from lightning_contrast.callbacks.collapse.recorder import Recorder
from lightning_contrast.callbacks.reporting import draw_spectra, log_values
from lightning_contrast.distributed import all_reduce_mean

WINDOW = 8
"""Number of batches of a measurement."""
MAX_HISTORY = 512
"""Maximum number of measurements kept: the first and the newest."""
_UNLOGGED = ("width", "rows", "possible")


class CollapseMonitor(L.Callback):
    """Measure features and projections every ``every_n_steps`` training batches; warn of a collapse and its cause.

    Needs no module of this package; for `lightning` and `pytorch_lightning`, automatic or manual optimization, DDP,
    FSDP1 and FSDP2; training stays bit-identical: feature hooks copy what the step computes, without an extra forward
    pass, random numbers or additions to the module.

    A measurement uses the last 8 batches, ``samples`` images over all ranks; the hooks are idle in all other batches.
    The first measurement follows after 8 batches and is the reference of some alarms. Logged: ``collapse/<key>`` for
    the features and ``collapse/projections/<key>`` for the projections (``std``, ``mean_cosine``, ``rankme``,
    ``effective_rank``, ``participation_ratio``, ``alpha_req``, ``uniformity``, ``dead_dims``, ``within_batch_std``,
    ``norm``, ``rms``, ``finite``; with two views ``alignment``, ``positive_cosine``, ``margin``);
    ``collapse/teacher/...`` if the projector has a momentum copy, ``collapse/scores/...`` if the module has prototypes
    or a ``teacher_temperature``, ``collapse/queue/staleness_cosine`` with a `MemoryBank`. ``docs/collapse.md`` defines
    the keys, and lists the thresholds and the runs they were derived from. The singular spectra of the first and the
    last measurement are drawn at an alarm and at the end of a fit, for loggers that accept images (requires
    matplotlib).

    Each alarm is raised once per kind and space: a warning with evidence and advice, an entry in ``findings``, and a
    snapshot file.

    Memory: ``samples`` rows of features, and of projections and teacher projections of at most two views each.
    Checkpoints include them while a measurement is in progress, so that a resumed run measures the same. For the
    overhead, see ``docs/collapse.md``; the host synchronizes with the device at measurements only.

    Args:
        features: As for `OnlineLinearProbe`.
        projections: Name of the submodule whose output enters the loss; "auto" selects "projector" or
            "projection_head" if there is one; None for features only.
        every_n_steps: Number of training batches between measurements; None: measure at the end of each validation.
        samples: Number of images of a measurement over all ranks, >= 16 and >= the number of ranks.
        action: "warn", or "stop" to end the run at the first alarm.
        snapshot_dir: Folder of the evidence of an alarm, ``collapse_step<step>.pt``, with measurements, spectra and
            rows. None: the logger's folder, or ``default_root_dir`` without a logger.
        name: Prefix of the logged names.
        tokens: As for `OnlineLinearProbe`.
        thresholds: Thresholds of the alarms; None for the defaults.

    Attributes:
        history: Measurements of this fit, oldest first.
        findings: Alarms of this fit.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If ``projections`` is neither a string nor None.
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
        self.history: list[Record] = []
        self.findings: list[Finding] = []
        self._recorder = Recorder(features, projections, tokens, -(-samples // WINDOW))
        self._buffer = RollingBuffer(WINDOW)
        self._batches = 0
        self._reported: set[str] = set()
        self._armed = False
        self._loss: Tensor | None = None
        self._first_spectra: dict[str, Tensor] = {}
        self._spectra: dict[str, Tensor] = {}
        self._pending: list[list[dict[str, Tensor]]] | None = None

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``."""
        return f"CollapseMonitor[{self.name}]"

    # Hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Reset the history (a checkpoint's is loaded later)."""
        if stage == "fit":
            self._buffer.clear()
            self.history, self.findings, self._reported, self._batches = [], [], set(), 0
            self._first_spectra, self._spectra, self._pending, self._armed = {}, {}, None, False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the feature hooks; layers exist in their final, wrapped form only from here on."""
        self._recorder.attach(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Arm the feature hooks if the batch is part of a measurement."""
        if self._pending is not None:
            self._buffer.restore(self._pending, pl_module.device)
            self._pending = None
        every = self.every_n_steps
        self._armed = every is None or self._batches < WINDOW or self._batches % every >= every - WINDOW
        if self._armed:
            self._recorder.arm(pl_module, batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Store the rows of the batch, and measure if due."""
        self._batches += 1
        if not self._armed:
            return
        self._armed = False
        with torch.no_grad():
            self._buffer.add(self._recorder.collect(pl_module, outputs))
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self._loss = loss.detach().float().mean() if isinstance(loss, Tensor) else None
            every = self.every_n_steps
            if every is not None and (self._batches % every == 0 or self._batches == min(WINDOW, every)):
                self._measure(trainer, pl_module, on_epoch=False)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure if ``every_n_steps`` is None."""
        if self.every_n_steps is None and not trainer.sanity_checking and len(self._buffer) > 0:
            with torch.no_grad():
                self._measure(trainer, pl_module, on_epoch=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the singular spectra."""
        draw_spectra(trainer, self.name, self._first_spectra, self._spectra)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the feature hooks."""
        self._recorder.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the feature hooks; `teardown` is not called after an exception."""
        self._recorder.detach()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return history, spectra, and the rows of all ranks for the measurement in progress."""
        return {
            "batches": self._batches,
            "history": [dict(record) for record in self.history],
            "reported": sorted(self._reported),
            "first_spectra": dict(self._first_spectra),
            "spectra": dict(self._spectra),
            "buffer": self._buffer.state() if self._pending is None else self._pending,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; rows are moved to the device before the next batch."""
        self._batches, self.history = state_dict["batches"], state_dict["history"]
        self._reported = set(state_dict["reported"])
        self._first_spectra, self._spectra = state_dict["first_spectra"], state_dict["spectra"]
        self._pending = state_dict["buffer"]

    # Measurement.

    def _measure(self, trainer: Any, pl_module: Any, *, on_epoch: bool) -> None:
        """Measure, log and diagnose; a collective operation with equal results on all ranks."""
        record, spectra, rows = measure_buffer(self._buffer)
        if self.every_n_steps is not None:
            self._buffer.clear()
        record["step"] = int(trainer.global_step)
        if self._loss is not None:
            record["loss"] = float(all_reduce_mean(self._loss))
        self.history.append(record)
        if len(self.history) > MAX_HISTORY:
            del self.history[1]
        self._spectra = spectra
        self._first_spectra = self._first_spectra or spectra
        log_values(trainer, pl_module, self._flat(record), on_epoch=on_epoch)
        facts = read_facts(trainer, pl_module)
        findings = diagnose(self.history, facts, self.thresholds)
        found = [f for f in findings if f"{f.kind}/{f.space}" not in self._reported]
        if found:
            self._alarm(trainer, found, record, rows)

    def _flat(self, record: Record) -> dict[str, float]:
        """Return the values of a measurement by logged name."""
        values: dict[str, float] = {}
        for space, numbers in record.items():
            if isinstance(numbers, dict):
                middle = "" if space == "features" else f"{space}/"
                kept = {key: value for key, value in numbers.items() if key not in _UNLOGGED and not math.isnan(value)}
                values |= {f"{self.name}/{middle}{key}": value for key, value in kept.items()}
        return values

    def _alarm(self, trainer: Any, found: list[Finding], record: Record, rows: dict[str, Tensor]) -> None:
        self.findings += found
        self._reported |= {f"{f.kind}/{f.space}" for f in found}
        path = self._save(trainer, record, rows) if trainer.is_global_zero else ""
        words = "\n".join(f"- {finding}" for finding in found)
        stops = " Stopping the run." if self.action == "stop" else ""
        rank_zero_warn(f"{type(self).__name__}:{stops}\n{words}\nEvidence: {path}")
        draw_spectra(trainer, self.name, self._first_spectra, self._spectra)
        if self.action == "stop":
            trainer.should_stop = True  # on all ranks: measurements are equal

    def _save(self, trainer: Any, record: Record, rows: dict[str, Tensor]) -> Path:
        """Write the evidence and return its path."""
        folder = Path(self.snapshot_dir or getattr(trainer.logger, "log_dir", None) or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name.replace('/', '_')}_step{record['step']}.pt"
        evidence = {
            "findings": [str(finding) for finding in self.findings],
            "history": self.history,
            "first_spectra": self._first_spectra,
            "spectra": self._spectra,
            # Views of the gathered tensors would be saved with all of their storage.
            "rows": {name: value.cpu().clone() for name, value in rows.items()},
        }
        torch.save(evidence, path)
        return path
