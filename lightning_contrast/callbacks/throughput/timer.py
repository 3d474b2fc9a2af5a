"""Clocks that tell what time went where: of the host, and of a CUDA device without waiting for it."""

import time
from collections import deque
from itertools import pairwise
from typing import Any, Protocol

import torch

Mark: Any = Any
"""What a clock gives for a moment."""


class Clock(Protocol):
    """Gives marks for moments, and tells later how far apart two of them are."""

    def now(self) -> Any:
        """Return a mark for this moment."""

    def passed(self, mark: Any) -> bool:
        """Tell whether a mark can be read by now, without waiting for it."""

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks that have passed."""

    def recycle(self, mark: Any) -> None:
        """Take back a mark that nobody needs any more."""


class HostClock:
    """The clock of the host, right where the work is done in the order in which it is asked for."""

    def now(self) -> float:
        """Return seconds."""
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        """Return True."""
        return True

    def seconds(self, start: float, end: float) -> float:
        """Return the difference."""
        return end - start

    def recycle(self, mark: float) -> None:
        """Do nothing."""


class CudaClock:
    """The clock of a CUDA stream: a mark is an event that the device reaches when it has done what came before.

    The time that the device waits for the host, which waits for data, lies between two events; the time that the host
    works ahead of the device does not. So what it measures adds up to the time of the run, though nothing waits.

    Args:
        device: Whose current stream is marked.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spare: list[Any] = []

    def now(self) -> Any:
        """Record an event in the stream."""
        new: Any = torch.cuda.Event
        event = self._spare.pop() if self._spare else new(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def passed(self, mark: Any) -> bool:
        """Ask the event."""
        return bool(mark.query())

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two events."""
        return float(start.elapsed_time(end)) / 1000

    def recycle(self, mark: Any) -> None:
        """Keep the event for another moment."""
        self._spare.append(mark)


class Ledger:
    """Adds up the time that a run spends in each category, step by step.

    At every moment one category is current. A step is closed where the next one begins; its times are added up as soon
    as its last mark has passed.

    Args:
        clock: See `Clock`.
        warmup: Steps at the beginning that do not count.
    """

    LIMIT = 1024
    """Closed steps that may wait for their marks; the oldest are forgotten beyond."""

    def __init__(self, clock: Clock, warmup: int) -> None:
        self.clock, self.warmup = clock, warmup
        self.seconds: dict[str, float] = {}
        self.images = self.steps = 0
        self.current = ""
        self._marks: list[tuple[str, Any]] = []
        self._closed: deque[tuple[list[tuple[str, Any]], int]] = deque()

    def switch(self, category: str) -> None:
        """Spend time on ``category`` from now on."""
        if category != self.current:
            self.current = category
            self._marks.append((category, self.clock.now()))

    def close_step(self, images: int) -> None:
        """End a step of ``images`` images; 0 where no step was made since the last one."""
        if images:
            end = self.clock.now()
            self._closed.append(([*self._marks, ("", end)], images))
            self._marks = [(self.current, end)]
            if len(self._closed) > self.LIMIT:
                self._closed.popleft()
        self.settle()

    def settle(self) -> None:
        """Add up the closed steps whose marks have passed."""
        clock = self.clock
        while self._closed and clock.passed(self._closed[0][0][-1][1]):
            marks, images = self._closed.popleft()
            if self.warmup > 0:
                self.warmup -= 1
            else:
                for (category, start), (_, end) in pairwise(marks):
                    self.seconds[category] = self.seconds.get(category, 0.0) + clock.seconds(start, end)
                self.images += images
                self.steps += 1
            for _, mark in marks[:-1]:  # the last one is the first of the next step
                clock.recycle(mark)

    def take(self) -> tuple[dict[str, float], int, int]:
        """Return the seconds by category, the images and the steps since the last call, and begin anew."""
        self.settle()
        taken = self.seconds, self.images, self.steps
        self.seconds, self.images, self.steps = {}, 0, 0
        return taken
