"""Check that a resumed run equals an uninterrupted run."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from lightning_contrast._checks import check_at_least, check_choice
from lightning_contrast.seeding import isolated
from lightning_contrast.testing._runs import fit, make
from lightning_contrast.testing._trace import UNSAVED, Difference, Trace, first_difference, largest_difference


def assert_resume_exact(
    make_module: Callable[[], L.LightningModule],
    make_data: Callable[[], Any],
    make_callbacks: Callable[[], Sequence[L.Callback]] = list,
    *,
    stop: int | Literal["epoch end", "mid-epoch"] = "epoch end",
    max_epochs: int = 2,
    weights_only: bool = True,
    ignore: Sequence[str] = (),
    **trainer_settings: Any,
) -> None:
    """Raise unless a run resumed from a checkpoint is bit-identical to the uninterrupted run.

    The module is trained once, and a checkpoint is written where `ModelCheckpoint` would write it. A second module,
    created with another seed, resumes from it. Batches, parameters, buffers, optimizers, learning rates and the global
    step are compared before each batch and at the end, the loss in each step, and the state of the callbacks at the
    end. State that is not in checkpoints (buffers with ``persistent=False``, plain attributes) may differ as long as
    nothing depends on it; otherwise the message names it. Runs on one device.

    There is no tolerance: one program runs twice on one machine, where nothing can round differently.

    Args:
        make_module: Returns a new module at each call.
        make_data: Returns new data at each call: a datamodule, a loader, or a pair of loaders (training, validation).
        make_callbacks: Returns new callbacks at each call, such as ``lambda: [StepSeed(0)]``.
        stop: When the checkpoint is written: at the end of the first epoch, in the middle of the second, or after a
            number of batches, >= 1. A stop within an epoch needs a loader with ``state_dict`` and ``load_state_dict``.
        max_epochs: Length of the run, >= 2 for the two named stops.
        weights_only: Load the checkpoint with ``weights_only=True``.
        ignore: Shell patterns for names in the message that may differ, such as ``"callback `Timer`*"``.
        **trainer_settings: Further arguments of the Trainer, such as ``accumulate_grad_batches=2``.

    Raises:
        AssertionError: If the runs differ; the message names the first difference and possible causes.
        ValueError: If the run ends before the stop, or an argument is out of range.
        TypeError: If a factory is not callable or returns the wrong type.
    """
    check_at_least("max_epochs", max_epochs, 1)
    if isinstance(stop, str):
        check_choice("stop", stop, ("epoch end", "mid-epoch"))
        check_at_least("max_epochs", max_epochs, 2, "A named stop needs a second epoch: give at least 2")
    else:
        check_at_least("stop", stop, 1)
    settings = {"max_epochs": max_epochs} | trainer_settings

    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        path = Path(folder) / "stopped.ckpt"
        save = _Save(path, stop)

        def run(seed: int, kept: Sequence[str] = (), **options: Any) -> Trace:
            with isolated(seed):
                module = make("make_module", make_module, L.LightningModule)
                for name, tensor in module.state_dict().items():
                    if name in kept and tensor.is_floating_point():
                        tensor.add_(1)  # reveals state that is not loaded
                callbacks, trace = make("make_callbacks", make_callbacks), Trace()
                save.batches = 0 if not options else save.batches
                extra = [trace] if options else [trace, save]
                fit(module, make("make_data", make_data), [*callbacks, *extra], folder, settings, **options)
                return trace

        whole = run(0)
        if not path.exists():
            hint = "Stop earlier, or train longer"
            raise ValueError(f"`stop` must come before the end of the run, got {stop!r}. {hint}.")
        kept = list(torch.load(path, map_location="cpu", weights_only=weights_only)["state_dict"])
        done = save.done
        resumed = run(1, kept, ckpt_path=path, weights_only=weights_only)
        difference = first_difference(whole.moments[2 * done :], resumed.moments, ignore)
        if difference is None:
            return
        again = first_difference(whole.moments, run(0).moments, ignore)
        unused = set(difference.names) if all(name.startswith(UNSAVED) for name in difference.names) else set()
        if again is not None and unused == set(again.names):
            return  # uninitialized memory
        raise AssertionError(_message(difference, again, whole, resumed, done))


class _Save(Checkpoint):
    """Writes one checkpoint where `ModelCheckpoint` would.

    Args:
        path: Path of the checkpoint.
        stop: See `assert_resume_exact`.

    Attributes:
        batches: Number of batches so far.
        done: Number of batches at the checkpoint.
    """

    def __init__(self, path: Path, stop: int | str) -> None:
        self.path, self.stop = path, stop
        self.batches = self.done = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint after a number of batches."""
        self.batches += 1
        at = self.stop
        if at == "mid-epoch":
            at = int(trainer.num_training_batches) + max(1, int(trainer.num_training_batches) // 2)
        if self.batches == at:
            self._write(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the checkpoint after the first epoch."""
        if self.stop == "epoch end" and trainer.current_epoch == 0:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.done = self.batches


def _message(difference: Difference, again: Difference | None, whole: Trace, resumed: Trace, done: int) -> str:
    """Describe the first difference and its possible causes."""
    names = difference.names
    lines = [
        f"The resumed run differs from the uninterrupted run. Stopped after {done} batches, it differs first "
        f"{difference.where}, in {_listed(names)}."
    ]
    if again is not None:
        lines.append(
            f"Two uninterrupted runs also differ, first {again.where}, in {_listed(again.names)}: the run is not "
            "reproducible from a seed."
        )
    at_start = difference.where == resumed.moments[0].where
    if "batch" in names:
        lines.append(
            "The loader yielded another batch: its order is not a function of seed and epoch, or it does not restore "
            "its position within an epoch (`state_dict` and `load_state_dict`)."
        )
    elif at_start and any(name.startswith(("parameter", "buffer")) for name in names):
        lines.append(
            "It was not saved in the checkpoint, or was changed after the checkpoint was written (as in the module's "
            "own `on_train_batch_end`) or after it was loaded."
        )
    elif names == ["loss"]:
        lines.append(
            "Batch and weights were equal, so the step drew other random numbers (`StepSeed` makes them a function "
            "of the step) or used state that is not in the checkpoint."
        )
    hints = [*difference.hints, *(name for name in names if name.startswith(UNSAVED))]
    if hints:
        lines.append(f"Not in the checkpoint, and different after the resume: {_listed(hints)}.")
    if any(name.startswith(UNSAVED) for name in hints):
        lines.append("Register such a buffer with `persistent=True`.")
    lines.append(largest_difference(whole.tensors, resumed.tensors))
    return "\n".join(line for line in lines if line)


def _listed(names: Sequence[str], most: int = 4) -> str:
    """Return the first names as an enumeration."""
    shown = ", ".join(f"the {name}" if not name.startswith("the ") else name for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
