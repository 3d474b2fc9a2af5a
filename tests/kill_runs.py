"""A harness that kills training runs: at any point of a step, and while a checkpoint is written."""

import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_contrast._checks import check_at_least
from lightning_contrast.checkpoints import AtomicCheckpointIO, check_checkpoint
from lightning_contrast.seeding import isolated
from lightning_contrast.testing._runs import fit, make
from lightning_contrast.testing._trace import UNSAVED, Moment, Trace, first_difference, largest_difference
from lightning_contrast.testing.processes import ChildError, run_processes
from tests.kill_points import Killer, Kind, Phase, Place, Point, read_note

_KINDS: tuple[Kind, ...] = ("step", "write", "any time")
_Run = tuple[list[Moment], dict[str, Tensor], dict[Phase, list[int]]]


@dataclass(frozen=True)
class Kill:
    """Where a run was killed and from where it resumed.

    Attributes:
        phase: "step": in a step, from the arrival of the batch to the last callback; "write": while a checkpoint was
            written or an old one removed; "between": anything else, such as validation.
        batch: Number of batches started.
        function: The function that was running.
        resumed_from: Number of batches trained at the checkpoint that the run resumed from; 0 for a restart.
        half_written: Whether the kill left an incomplete file.
    """

    phase: Phase
    batch: int
    function: str
    resumed_from: int
    half_written: bool


def assert_survives_kills(
    make_module: Callable[[], L.LightningModule],
    make_data: Callable[[], Any],
    make_callbacks: Callable[[], Sequence[L.Callback]] = list,
    *,
    kills: int = 6,
    seed: int = 0,
    every_n_train_steps: int = 1,
    max_epochs: int = 2,
    timeout: float = 120.0,
    ignore: Sequence[str] = (),
    **trainer_settings: Any,
) -> list[Kill]:
    """Raise unless a run that is killed (SIGKILL) and resumed ends bit-identical to an uninterrupted run.

    The module is first trained without interruption. For each kill, one process trains from scratch and is killed, and
    another resumes with ``ckpt_path="last"``; its state before and in each batch and at the end is compared as in
    `assert_resume_exact`. Kills alternate between a function call drawn from all calls of a random step, one drawn from
    all calls while a random checkpoint is written or an old one removed, and a second thread within 50 ms of the start
    of a random step. The processes are forks that train on one CPU device; a small module takes about 1 s per kill.

    Args:
        make_module: Returns a new module at each call.
        make_data: Returns new data at each call; it must keep its position within an epoch if checkpoints are written
            within epochs.
        make_callbacks: Returns new callbacks at each call, such as ``lambda: [StepSeed(0)]``.
        kills: Number of kills, >= 1; with 2 or more, both steps and writes are covered.
        seed: Seed of the choice of points, >= 0.
        every_n_train_steps: Optimizer steps between checkpoints, >= 1; the last one is kept, twice.
        max_epochs: Length of the run, >= 1.
        timeout: Time limit per run in seconds.
        ignore: Shell patterns for names that may differ, such as ``"callback `Timer`*"``.
        **trainer_settings: Further arguments of the Trainer; ``plugins`` is an `AtomicCheckpointIO` unless given.

    Returns:
        Where each run was killed, and from where it resumed.

    Raises:
        AssertionError: If a run cannot be resumed or ends differently; the message names the point of the kill and the
            first difference.
        ValueError: If an argument is out of range or the run writes no checkpoint.
        TypeError: If a factory is not callable or returns the wrong type.
        ChildError: If the run fails without being killed.
    """
    check_at_least("kills", kills, 1)
    check_at_least("seed", seed, 0)
    check_at_least("every_n_train_steps", every_n_train_steps, 1)
    check_at_least("max_epochs", max_epochs, 1)
    draw = random.Random(seed)
    settings = {"max_epochs": max_epochs} | trainer_settings

    def train(rank: int, folder: Path, killer: Killer | None) -> _Run:
        last = "last" if any(folder.glob("last*.ckpt")) else None
        with isolated(0 if last is None else 1):  # another seed shows state that is not loaded
            module = make("make_module", make_module, L.LightningModule)
            trace = Trace()
            saves = ModelCheckpoint(folder, every_n_train_steps=every_n_train_steps, save_last=True)
            callbacks = [*make("make_callbacks", make_callbacks), *([] if killer is None else [killer]), saves, trace]
            own = {"plugins": [AtomicCheckpointIO()]} | settings
            warnings.simplefilter("ignore")
            fit(module, make("make_data", make_data), callbacks, folder, own, ckpt_path=last, weights_only=True)
        return trace.moments, trace.tensors, {} if killer is None else killer.counts

    def start(folder: Path, killer: Killer | None) -> _Run:
        run: _Run = run_processes(train, 1, folder, killer, init=False, timeout=timeout)[0]
        return run

    def kill(folder: Path, point: Point) -> Place:
        note = folder / "killed"
        try:
            start(folder, Killer(point, note))
        except ChildError:
            place = read_note(note)
            if place is not None:
                return place
            raise
        raise AssertionError("The process was not killed.")

    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        with warnings.catch_warnings():
            train(0, Path(name) / "here", None)  # in this process, so that the forks share its imports
        whole, tensors, counts = start(Path(name) / "whole", Killer(None, Path(name) / "none"))
        landed = []
        for number in range(kills):
            folder = Path(name) / str(number)
            folder.mkdir()
            place = kill(folder, Point.drawn(draw, _KINDS[number % len(_KINDS)], counts))
            half_written = _has_half_written(folder)
            try:
                resumed, ends, _ = start(folder, None)
            except ChildError as error:
                raise AssertionError(f"Killed in {place}, the run cannot be resumed. {error}") from error
            done = len(whole) - len(resumed)
            difference = first_difference(whole[done:], resumed, [*ignore, f"{UNSAVED}*"])
            if difference is not None:
                raise AssertionError(
                    f"Killed in {place}, and resumed after batch {done // 2}, the run differs from the uninterrupted "
                    f"run, first {difference.where}, in the {', the '.join(difference.names[:4])}.\n"
                    f"{largest_difference(tensors, ends)}"
                )
            landed.append(Kill(place.phase, place.batch, place.function, done // 2, half_written))
    return landed


def _has_half_written(folder: Path) -> bool:
    """Return whether a folder holds an incomplete checkpoint or temporary file."""
    if any(folder.rglob(".*.part")):
        return True
    for path in folder.rglob("*.ckpt"):
        try:
            check_checkpoint(path)
        except ValueError:
            return True
    return False
