"""Check that a run survives being killed: at any point of a step, and in the middle of writing a checkpoint."""

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
from lightning_contrast.testing._kills import Kind, Phase, Place, Point, Watch, read_note
from lightning_contrast.testing._runs import fit, make, seeded
from lightning_contrast.testing._trace import UNSAVED, Moment, Trace, first_difference, largest_difference
from lightning_contrast.testing.processes import ChildError, run_processes

_KINDS: tuple[Kind, ...] = ("step", "write", "any time")
_Run = tuple[list[Moment], dict[str, Tensor], dict[Phase, list[int]]]


@dataclass(frozen=True)
class Kill:
    """Where a run was killed, and where it went on.

    Attributes:
        phase: "step": in a step, from the batch's arrival to the last callback; "write": while a checkpoint was written
            or an old one removed; "between": anything else, such as validation.
        batch: How many batches had begun.
        function: The function that was running.
        resumed_from: After how many batches the checkpoint was written that the run went on from; 0: from the start.
        half_written: Whether the kill left a file that is not whole.
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
    """Raise unless a run that is killed (SIGKILL) and resumed ends, bit for bit, as the run that was not.

    The module is trained without a stop. Then, for each kill, a process trains it anew and is killed; another one
    goes on with ``ckpt_path="last"``, and what it holds before and in each of its batches and at its end is compared,
    as by `assert_resume_exact`. In turn the kill comes at a function call that is drawn from all calls of a random
    step; at one drawn from all calls while a random checkpoint is written or an old one removed; and from a second
    thread, within 50 ms of the start of a random step. The processes are forks that train on one device, the CPU, so
    that a small module takes about a second a kill.

    Args:
        make_module: Makes a new module at each call.
        make_data: Makes new data at each call; it must keep its place in an epoch where checkpoints fall within one.
        make_callbacks: Makes new callbacks at each call, such as ``lambda: [StepSeed(0)]``.
        kills: How many, >= 1; from 2 on some come in a step and some in a write.
        seed: Of the choice of the points, >= 0.
        every_n_train_steps: Optimizer steps between checkpoints, >= 1; the last one is kept, twice.
        max_epochs: Length of the run, >= 1.
        timeout: Seconds that each run may take.
        ignore: Shell patterns for names in the message that may differ, such as ``"callback `Timer`*"``.
        **trainer_settings: Further arguments of the Trainer; ``plugins`` is an `AtomicCheckpointIO` unless given.

    Returns:
        Where each kill landed, and where the run went on.

    Raises:
        AssertionError: If a run cannot be resumed, or ends otherwise; the message tells where it was killed, what
            differs first, and where.
        ValueError: If an argument is out of its range, or the run writes no checkpoint.
        TypeError: If a factory is none, or makes something else.
        ChildError: If the run fails without being killed.
    """
    check_at_least("kills", kills, 1)
    check_at_least("seed", seed, 0)
    check_at_least("every_n_train_steps", every_n_train_steps, 1)
    check_at_least("max_epochs", max_epochs, 1)
    draw = random.Random(seed)  # noqa: S311  chooses points of a run
    settings = {"max_epochs": max_epochs} | trainer_settings

    def train(rank: int, folder: Path, watch: Watch | None) -> _Run:
        last = "last" if any(folder.glob("last*.ckpt")) else None
        with seeded(0 if last is None else 1):  # other numbers, so that what is not loaded shows
            module = make("make_module", make_module, L.LightningModule)
            trace = Trace()
            saves = ModelCheckpoint(folder, every_n_train_steps=every_n_train_steps, save_last=True)
            callbacks = [*make("make_callbacks", make_callbacks), *([] if watch is None else [watch]), saves, trace]
            own = {"plugins": [AtomicCheckpointIO()]} | settings
            warnings.simplefilter("ignore")  # nobody reads them, and the second process says them all again
            fit(module, make("make_data", make_data), callbacks, folder, own, ckpt_path=last, weights_only=True)
        return trace.moments, trace.tensors, {} if watch is None else watch.counts

    def start(folder: Path, watch: Watch | None) -> _Run:
        run: _Run = run_processes(train, 1, folder, watch, init=False, timeout=timeout)[0]
        return run

    def kill(folder: Path, point: Point) -> Place:
        note = folder / "killed"
        try:
            start(folder, Watch(point, note))
        except ChildError:
            place = read_note(note)
            if place is not None:
                return place
            raise
        raise AssertionError("The process outlived its kill.")

    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        with warnings.catch_warnings():
            train(0, Path(name) / "here", None)  # in this process, so that its forks have nothing left to import
        whole, tensors, counts = start(Path(name) / "whole", Watch(None, Path(name) / "none"))
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
                    f"Killed in {place}, and resumed after batch {done // 2}, the run is not the run that was not "
                    f"killed. It differs first {difference.where}, in the {', the '.join(difference.names[:4])}.\n"
                    f"{largest_difference(tensors, ends)}"
                )
            landed.append(Kill(place.phase, place.batch, place.function, done // 2, half_written))
    return landed


def _has_half_written(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint that is not whole, or the beginning of one."""
    if any(folder.rglob(".*.part")):
        return True
    for path in folder.rglob("*.ckpt"):
        try:
            check_checkpoint(path)
        except ValueError:
            return True
    return False
