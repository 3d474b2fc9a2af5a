"""Dynamic batching: requests of one item each, from any threads, run through a model together."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar

from lightning_contrast._checks import check_at_least, check_not_negative

Given = TypeVar("Given")
Prepared = TypeVar("Prepared")


class FullError(RuntimeError):
    """There are too many items at work, or no more are taken."""


class Batcher(Generic[Given, Prepared]):
    """Prepare items in threads, collect them to batches and run those one after the other in a thread.

    A batch is run as soon as it is full, or ``max_delay`` after its first item. While a batch runs, the next one is
    collected.

    Args:
        prepare: Maps an item to the input of the model; an error that it raises is that of the item.
        run: Maps B inputs to B results.
        max_batch: Largest batch.
        max_delay: Time that an item waits for others, in seconds.
        max_waiting: Items that may be at work at a time, prepared, waiting or running.
        on_batch: Called with the size and the seconds of each batch that ran.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        prepare: Callable[[Given], Prepared],
        run: Callable[[Sequence[Prepared]], Iterable[Any]],
        *,
        max_batch: int,
        max_delay: float,
        max_waiting: int,
        on_batch: Callable[[int, float], object] = lambda size, seconds: None,
    ) -> None:
        check_at_least("max_batch", max_batch, 1)
        check_at_least("max_waiting", max_waiting, 1)
        check_not_negative("max_delay", max_delay)
        self._prepare, self._run, self._on_batch = prepare, run, on_batch
        self._max_batch, self._max_delay, self._max_waiting = max_batch, max_delay, max_waiting
        self._queue: queue.SimpleQueue[tuple[Prepared, Future[Any]] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "prepare")
        self._lock, self._at_work, self._is_closed = threading.Condition(), 0, False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def at_work(self) -> int:
        """Return the number of items that are prepared, wait or run."""
        return self._at_work

    def submit(self, items: Sequence[Given]) -> list[Future[Any]]:
        """Return the futures of the results of items, which are taken together or not at all.

        A future that is cancelled leaves its batch, if that does not run already.

        Raises:
            FullError: If there are too many items at work, or `close` was called.
        """
        with self._lock:
            if self._is_closed:
                raise FullError("The service is stopping.")
            if self._at_work + len(items) > self._max_waiting:
                raise FullError(f"{self._at_work} items are at work already; try again later.")
            self._at_work += len(items)
            return [self._start(item) for item in items]

    def close(self, seconds: float = 30.0) -> bool:
        """Take no more items, finish those at work, and end the threads; return whether all finished in time."""
        with self._lock:
            self._is_closed = True
            finished = self._lock.wait_for(lambda: self._at_work == 0, seconds)
        self._queue.put(None)
        self._pool.shutdown(wait=False, cancel_futures=True)
        return finished

    def _start(self, item: Given) -> Future[Any]:
        result: Future[Any] = Future()
        self._pool.submit(self._prepare_one, item, result)
        return result

    def _prepare_one(self, item: Given, result: Future[Any]) -> None:
        if result.cancelled():
            self._finish(result)
            return
        try:
            prepared = self._prepare(item)
        except Exception as error:  # noqa: BLE001  # belongs to the caller of the future
            self._finish(result, error=error)
            return
        self._queue.put((prepared, result))

    def _work(self) -> None:
        while (batch := self._collect()) is not None:
            running = [(item, result) for item, result in batch if result.set_running_or_notify_cancel()]
            for _, result in batch:
                if result.cancelled():
                    self._finish(result)
            if running:
                self._run_batch(running)

    def _run_batch(self, batch: list[tuple[Prepared, Future[Any]]]) -> None:
        start = time.perf_counter()
        try:
            values = self._run([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001  # belongs to the callers of the futures
            for _, result in batch:
                self._finish(result, error=error)
            return
        self._on_batch(len(batch), time.perf_counter() - start)
        for (_, result), value in zip(batch, values, strict=True):
            self._finish(result, value)

    def _collect(self) -> list[tuple[Prepared, Future[Any]]] | None:
        """Return the next batch, or None at the end."""
        first = self._queue.get()
        if first is None:
            return None
        batch, deadline = [first], time.monotonic() + self._max_delay
        while len(batch) < self._max_batch:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                self._queue.put(None)  # for the next call
                break
            batch.append(item)
        return batch

    def _finish(self, result: Future[Any], value: Any = None, error: Exception | None = None) -> None:
        with self._lock:
            self._at_work -= 1
            self._lock.notify_all()
        with suppress(InvalidStateError):  # it was cancelled
            if error is not None:
                result.set_exception(error)
            elif not result.cancelled():
                result.set_result(value)
