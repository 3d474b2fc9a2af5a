"""Run a function in several processes without torchrun."""

import os
import pickle  # for results of forked children only
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class ChildError(RuntimeError):
    """A process failed; the message contains its traceback."""


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_processes(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    init: bool = True,
) -> list[Any]:
    """Run ``fn(rank, *args)`` in ``world_size`` forked processes with one torch thread each.

    The processes are forks, so closures and lambdas can be used; results must be picklable. A process that has used
    CUDA cannot be forked: use the CPU.

    Args:
        fn: Function called with the rank as the first argument.
        world_size: Number of processes.
        *args: Further arguments of ``fn``.
        timeout: Time limit in seconds, after which the processes are killed.
        init: True initializes a gloo process group before ``fn``. False only sets LOCAL_RANK, NODE_RANK, WORLD_SIZE,
            MASTER_ADDR and MASTER_PORT, for a Trainer with ``strategy="ddp"``, FSDP or ModelParallel and
            ``devices=world_size``.

    Returns:
        The results of all ranks, in rank order.

    Raises:
        ChildError: If a process raised or died; the others are killed.
        TimeoutError: If the processes take longer than ``timeout``.
    """
    context = get_context("fork")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        store = str(Path(folder) / "store")
        connections, processes = [], []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child, args=(sender, fn, rank, world_size, port, store if init else None, timeout, args)
                )
                with warnings.catch_warnings():
                    # Python warns about forks of processes with threads; the children do not use their locks.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                sender.close()
                connections.append(receiver)
                processes.append(process)
            results = _collect(connections, timeout)
            for process in processes:
                process.join(timeout=10)
            return results
        finally:
            for process in processes:
                process.kill()  # no effect on finished processes
                process.join()
            for connection in connections:
                connection.close()


def _collect(connections: list[Connection], timeout: float) -> list[Any]:
    """Receive one result from each process."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    waiting = {id(connection): rank for rank, connection in enumerate(connections)}
    while len(results) < len(connections):
        pending = [connection for connection in connections if waiting[id(connection)] not in results]
        ready: list[Any] = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(connections))) - set(results))
            raise TimeoutError(f"Ranks {missing} did not end within {timeout} s.")
        for connection in ready:
            rank = waiting[id(connection)]
            try:
                ok, payload = connection.recv()
            except EOFError:
                raise ChildError(f"Rank {rank} died without a result.") from None
            if not ok:
                raise ChildError(f"Rank {rank} failed:\n{payload}")
            results[rank] = pickle.loads(payload)  # noqa: S301  from a child process
    return [results[rank] for rank in range(len(connections))]


def _child(
    sender: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    store: str | None,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    """Set up the process, call ``fn`` and send the result or the traceback."""
    try:
        torch.set_num_threads(1)
        os.environ.update(
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
        )
        if store is not None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
        # Plain pickle, because multiprocessing shares tensors in memory that is freed with this process.
        result: tuple[bool, bytes | str] = (True, pickle.dumps(fn(rank, *args)))
    except BaseException:  # noqa: BLE001  the parent raises it with the traceback
        result = (False, traceback.format_exc())
    sender.send(result)
    sender.close()
    if dist.is_initialized() and result[0]:
        dist.destroy_process_group()
