"""A callback that counts the function calls of a run, or kills the process at a chosen call."""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lightning_contrast._checks import require

Phase = Literal["step", "write", "between"]
Kind = Literal["step", "write", "any time"]
_LATEST = 0.05  # seconds after the start of a step before which a kill at any time happens


@dataclass(frozen=True)
class Place:
    """Where a run was killed.

    Attributes:
        phase: "step", "write" or "between".
        batch: Number of batches started.
        function: The function that was running.
    """

    phase: Phase
    batch: int
    function: str

    def __str__(self) -> str:
        during = {"step": "a step", "write": "a checkpoint write", "between": "the time between steps"}
        return f"{during[self.phase]}, after the start of batch {self.batch}, in {self.function}"


@dataclass(frozen=True)
class Point:
    """Where to kill a run.

    Attributes:
        kind: In a step, in a write, or at any time.
        instance: Index of the step or write in the run, from 0.
        call: Index of the function call in it, from 0.
        delay: Seconds after the start of the step, for a kill at any time.
    """

    kind: Kind
    instance: int
    call: int
    delay: float

    @classmethod
    def drawn(cls, draw: random.Random, kind: Kind, counts: dict[Phase, list[int]]) -> "Point":
        """Draw a point uniformly from all points of a kind.

        Args:
            draw: Random generator.
            kind: In a step, in a write, or at any time.
            counts: Number of calls in each step and each write of the run.
        """
        among = counts["write" if kind == "write" else "step"]
        hint = "Lower `every_n_train_steps`, or train longer"
        require(bool(among), "every_n_train_steps", "let the run write a checkpoint", "none written", hint)
        instance = draw.randrange(len(among))
        return cls(kind, instance, draw.randrange(max(among[instance], 1)), draw.uniform(0, _LATEST))


class Killer(Checkpoint):
    """Kill the process at a point of a run. A `Checkpoint` runs after all other callbacks of a step.

    Args:
        point: Where to kill; None only counts calls.
        note: File that records where the process was killed.

    Attributes:
        counts: Number of calls in each step and each write of the run.
    """

    def __init__(self, point: Point | None, note: Path) -> None:
        self.point, self.note = point, note
        self.counts: dict[Phase, list[int]] = {"step": [], "write": []}
        self._phase: Phase = "between"
        self._calls = self._batches = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wrap the checkpoint IO of the strategy; never unwrapped, because the run has its own process."""
        strategy: Any = trainer.strategy
        strategy.save_checkpoint = self._wrapped(strategy.save_checkpoint)
        strategy.remove_checkpoint = self._wrapped(strategy.remove_checkpoint)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Enter a step."""
        self._batches += 1
        self._enter("step")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave a step."""
        self._leave()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Kill the process here if it has not been killed before."""
        if self.point is not None:
            self._die(sys._getframe())

    def _wrapped(self, inner: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            self._enter("write")
            try:
                inner(*args, **kwargs)
            finally:
                self._leave()

        return wrapped

    def _enter(self, phase: Phase) -> None:
        self._phase, self._calls = phase, 0
        self.counts[phase].append(0)
        if self.point is None:
            sys.setprofile(self._count)
        elif self.point.instance == len(self.counts[phase]) - 1:
            if self.point.kind == phase:
                sys.setprofile(self._count)
            elif self.point.kind == "any time" and phase == "step":
                threading.Thread(target=self._die_later, args=(threading.get_ident(),), daemon=True).start()

    def _leave(self) -> None:
        profiled = sys.getprofile() is not None
        sys.setprofile(None)
        if self.point is None:
            self.counts[self._phase][-1] = self._calls
        elif profiled:
            self._die(sys._getframe())  # fewer calls than in the counted run
        self._phase = "between"

    def _count(self, frame: FrameType, event: str, called: Any) -> None:
        if event not in ("call", "c_call"):
            return
        self._calls += 1
        if self.point is not None and self._calls > self.point.call:
            self._die(frame, f" calling {called.__name__}" if event == "c_call" else "")

    def _die_later(self, main: int) -> None:
        assert self.point is not None
        time.sleep(self.point.delay)
        self._die(sys._current_frames()[main])

    def _die(self, frame: FrameType, call: str = "") -> None:
        sys.setprofile(None)
        function = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}{call}"
        self.note.write_text(f"{self._phase}\n{self._batches}\n{function}", encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)


def read_note(note: Path) -> Place | None:
    """Return where a run was killed, or None if it was not.

    Args:
        note: File written by a `Killer`.
    """
    if not note.exists():
        return None
    phase, batch, function = note.read_text(encoding="utf-8").split("\n")
    return Place(phase, int(batch), function)  # type: ignore[arg-type]  # one of the phases
