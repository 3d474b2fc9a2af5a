"""Timers of the host and of a CUDA stream, and the time that training steps spend in each category."""

import time
from collections import deque
from itertools import pairwise
from typing import Any

import torch


class Timer:
    """Timer of the host, exact on devices that run operations synchronously."""

    def now(self) -> Any:
        """Return a mark of the current time."""
        return time.perf_counter()

    def ready(self, mark: Any) -> bool:
        """Return whether a mark can be read without waiting for the device."""
        return True

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks that are ready."""
        return float(end - start)

    def recycle(self, mark: Any) -> None:
        """Take back a mark that is no longer needed."""


class CudaTimer(Timer):
    """Timer of a CUDA stream: marks are events, read once the device has reached them.

    The time between two events includes time in which the device is idle, for example while it waits for data, and
    excludes work that the host does ahead of the device. The sum over all intervals is the duration of the run, without
    synchronization.

    Args:
        device: CUDA device whose current stream is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Any] = []

    def now(self) -> Any:
        """Record an event in the current stream."""
        new: Any = torch.cuda.Event
        event = self._free.pop() if self._free else new(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def ready(self, mark: Any) -> bool:
        """Return whether the device has reached an event."""
        return bool(mark.query())

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two events."""
        return float(start.elapsed_time(end)) / 1000

    def recycle(self, mark: Any) -> None:
        """Keep an event for reuse."""
        self._free.append(mark)


class StepTimer:
    """Sum of the time that training steps spend in each category.

    Exactly one category is active at any time. A step ends where the next one starts; its time is added once its last
    mark is ready.

    Args:
        timer: Source of the marks.
        warmup: Number of initial steps to exclude.
    """

    MAX_PENDING = 1024
    """Maximum number of finished steps whose marks are not ready; the oldest are dropped."""

    def __init__(self, timer: Timer, warmup: int) -> None:
        self.timer, self.warmup = timer, warmup
        self.seconds: dict[str, float] = {}
        self.images = self.steps = 0
        self.active = ""
        self._marks: list[tuple[str, Any]] = []
        self._pending: deque[tuple[list[tuple[str, Any]], int]] = deque()

    def switch(self, category: str) -> None:
        """Make ``category`` the active one."""
        if category != self.active:
            self.active = category
            self._marks.append((category, self.timer.now()))

    def end_step(self, images: int) -> None:
        """End a step of ``images`` images; 0 if there was no step since the last call."""
        if images:
            end = self.timer.now()
            self._pending.append(([*self._marks, ("", end)], images))
            self._marks = [(self.active, end)]
            if len(self._pending) > self.MAX_PENDING:
                self._pending.popleft()
        self._add_ready()

    def take(self) -> tuple[dict[str, float], int, int]:
        """Return seconds per category, images and steps since the last call, and reset them."""
        self._add_ready()
        taken = self.seconds, self.images, self.steps
        self.seconds, self.images, self.steps = {}, 0, 0
        return taken

    def _add_ready(self) -> None:
        timer = self.timer
        while self._pending and timer.ready(self._pending[0][0][-1][1]):
            marks, images = self._pending.popleft()
            if self.warmup > 0:
                self.warmup -= 1
            else:
                for (category, start), (_, end) in pairwise(marks):
                    self.seconds[category] = self.seconds.get(category, 0.0) + timer.seconds(start, end)
                self.images += images
                self.steps += 1
            for _, mark in marks[:-1]:  # the last mark is also the first of the next step
                timer.recycle(mark)
