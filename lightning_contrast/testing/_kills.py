"""A callback that counts the function calls of a run, and one that kills its process at a chosen one of them."""

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
_LATEST = 0.05  # seconds after the start of a step at which a kill from outside comes at the latest


@dataclass(frozen=True)
class Place:
    """Where a run was killed.

    Attributes:
        phase: What it was doing.
        batch: How many batches had begun.
        function: The function that was running.
    """

    phase: Phase
    batch: int
    function: str

    def __str__(self) -> str:
        during = {"step": "a step", "write": "the writing of a checkpoint", "between": "what is between the steps"}
        return f"{during[self.phase]}, after the start of batch {self.batch}, in {self.function}"


@dataclass(frozen=True)
class Point:
    """Where a run is to be killed.

    Attributes:
        kind: In a step, in a write, or at any time.
        instance: Which of the steps or writes of the run, from 0.
        call: Which function call in it, from 0.
        delay: Seconds after its start, for a kill at any time.
    """

    kind: Kind
    instance: int
    call: int
    delay: float

    @classmethod
    def drawn(cls, draw: random.Random, kind: Kind, counts: dict[Phase, list[int]]) -> "Point":
        """Draw a point from all those of a kind.

        Args:
            draw: Draws it.
            kind: In a step, in a write, or at any time.
            counts: Calls in each step and in each write of the run.
        """
        among = counts["write" if kind == "write" else "step"]
        hint = "Lower `every_n_train_steps`, or train longer"
        require(bool(among), "every_n_train_steps", "let the run write a checkpoint", "none written", hint)
        instance = draw.randrange(len(among))
        return cls(kind, instance, draw.randrange(max(among[instance], 1)), draw.uniform(0, _LATEST))


class Watch(Checkpoint):
    """Follows a run, and kills its process at a point. Of the base that runs after all other callbacks of a step.

    Args:
        point: Where to; None: only count.
        note: The file in which it writes down where it did.

    Attributes:
        counts: Calls in each step and in each write of the run.
    """

    def __init__(self, point: Point | None, note: Path) -> None:
        self.point, self.note = point, note
        self.counts: dict[Phase, list[int]] = {"step": [], "write": []}
        self._phase: Phase = "between"
        self._calls = self._batches = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Follow the strategy's writing; for good, since the run has a process of its own."""
        strategy: Any = trainer.strategy
        strategy.save_checkpoint = self._followed(strategy.save_checkpoint)
        strategy.remove_checkpoint = self._followed(strategy.remove_checkpoint)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Enter the step."""
        self._batches += 1
        self._enter("step")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the step."""
        self._leave()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Kill the process at the latest here."""
        if self.point is not None:
            self._die(sys._getframe())

    def _followed(self, inner: Callable[..., None]) -> Callable[..., None]:
        def followed(*args: Any, **kwargs: Any) -> None:
            self._enter("write")
            try:
                inner(*args, **kwargs)
            finally:
                self._leave()

        return followed

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
        followed = sys.getprofile() is not None
        sys.setprofile(None)
        if self.point is None:
            self.counts[self._phase][-1] = self._calls
        elif followed:
            self._die(sys._getframe())  # the run made fewer calls than the one that was counted
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
        note: The file that a `Watch` wrote.
    """
    if not note.exists():
        return None
    phase, batch, function = note.read_text(encoding="utf-8").split("\n")
    return Place(phase, int(batch), function)  # type: ignore[arg-type]  # one of the phases
