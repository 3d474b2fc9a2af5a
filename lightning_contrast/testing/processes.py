"""Several processes without torchrun: start a function in each and return what each of them gives."""

import os
import pickle  # what forked children send back; nothing from outside is read
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
    """A process failed; the message holds its traceback."""


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
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

    Closures and lambdas are fine, since the processes are forks; what ``fn`` returns must pickle. A process that has
    used CUDA cannot be forked: the processes are for the CPU.

    Args:
        fn: Called with the rank first.
        world_size: Number of processes.
        *args: Passed on to ``fn``.
        timeout: Seconds until the processes started here are killed and a TimeoutError is raised.
        init: True: a gloo process group is ready when ``fn`` starts. False: there is none, but LOCAL_RANK, NODE_RANK,
            WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, so that a Trainer with ``strategy="ddp"``, FSDP or
            ModelParallel and ``devices=world_size`` joins the other processes.

    Returns:
        What each rank returned, in rank order.

    Raises:
        ChildError: If a process raised or died; the other processes are killed.
        TimeoutError: If the processes took longer than ``timeout``.
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
                    # Python warns of forks while other threads run; the children use one thread and no lock of theirs.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                sender.close()
                connections.append(receiver)
                processes.append(process)
            answers = _collect(connections, timeout)
            for process in processes:
                process.join(timeout=10)
            return answers
        finally:
            for process in processes:
                process.kill()  # no effect on those that have ended
                process.join()
            for connection in connections:
                connection.close()


def _collect(connections: list[Connection], timeout: float) -> list[Any]:
    """Receive one answer from each process."""
    deadline = time.monotonic() + timeout
    answers: dict[int, Any] = {}
    waiting = {id(connection): rank for rank, connection in enumerate(connections)}
    while len(answers) < len(connections):
        pending = [connection for connection in connections if waiting[id(connection)] not in answers]
        ready: list[Any] = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(connections))) - set(answers))
            raise TimeoutError(f"Ranks {missing} did not end within {timeout} s.")
        for connection in ready:
            rank = waiting[id(connection)]
            try:
                ok, payload = connection.recv()
            except EOFError:
                raise ChildError(f"Rank {rank} died without an answer.") from None
            if not ok:
                raise ChildError(f"Rank {rank} failed:\n{payload}")
            answers[rank] = pickle.loads(payload)  # noqa: S301  the bytes come from a process forked here
    return [answers[rank] for rank in range(len(connections))]


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
    """Set the process up, call ``fn`` and send the answer or the traceback."""
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
        # Plain pickle: multiprocessing's own would share tensors through memory that ends with this process.
        answer: tuple[bool, bytes | str] = (True, pickle.dumps(fn(rank, *args)))
    except BaseException:  # noqa: BLE001  the parent raises it again with the traceback
        answer = (False, traceback.format_exc())
    sender.send(answer)
    sender.close()
    if dist.is_initialized() and answer[0]:
        dist.destroy_process_group()
