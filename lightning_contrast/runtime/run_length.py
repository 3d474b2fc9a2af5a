"""Length of a run: optimizer steps, warm-up and global batch size, as the Trainer is configured."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_contrast import distributed
from lightning_contrast._checks import fail

_LENGTH = "_lightning_contrast_length"  # attribute of a Trainer
_CALLBACKS = "_lightning_contrast_callbacks"  # attribute of a Trainer: its callbacks at the setup of the fit
_TOLERANCE = 0.1  # relative; a smaller difference of epoch lengths is due to skipped steps
_BEGINS_OR_ENDS = re.compile(r"(?:\w+_)?start_epoch|(?:freeze|warmup)_\w+_epochs")  # names of arguments
_WARMUP_SHARE = 10  # a default warm-up that does not fit takes a tenth of the run


@dataclass(frozen=True)
class RunLength:
    """Optimizer steps of a run, which all schedules share.

    Args:
        total_steps: Optimizer steps of the run; infinity for an endless run, or for epochs of unknown length.
        batches: Batches per epoch and rank; infinity if the loader has no length.
        accumulation: Pairs of a first epoch and the batches per optimizer step from it on, by epoch; the first is 0.
    """

    total_steps: float
    batches: float
    accumulation: tuple[tuple[int, int], ...]

    def accumulated(self, epoch: int) -> int:
        """Return the batches per optimizer step in an epoch."""
        return [batches for first, batches in self.accumulation if first <= epoch][-1]

    def steps_of(self, epochs: int) -> float:
        """Return the optimizer steps of the first epochs; infinity if the loader has no length."""
        if epochs == 0 or not math.isfinite(self.batches):
            return self.batches if epochs else 0
        ends = [*(first for first, _ in self.accumulation[1:]), epochs]
        steps = 0
        for (first, accumulated), end in zip(self.accumulation, ends, strict=True):
            steps += max(0, min(end, epochs) - first) * math.ceil(self.batches / accumulated)
        return steps


def measure_run(trainer: L.Trainer) -> RunLength:
    """Measure the run as the Trainer is configured now, and keep the result for all schedules.

    `GradientAccumulationScheduler` is read. The additional epoch of `StochasticWeightAveraging`, which only updates the
    statistics of BatchNorm, does not count.

    Args:
        trainer: The Trainer, whose training loader is set up.
    """
    if trainer.limit_train_batches == 0:  # nothing is trained
        return RunLength(1, 1, ((0, 1),))
    batches, epochs = float(trainer.num_training_batches), trainer.max_epochs
    accumulation = [(0, trainer.accumulate_grad_batches)]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            accumulation = sorted(callback.scheduling.items())
        if isinstance(callback, StochasticWeightAveraging) and getattr(callback, "_model_contains_batch_norm", False):
            planned = callback._max_epochs  # the Trainer's, before it was increased
            epochs = planned if planned > 0 and epochs == planned + 1 else epochs
    length = RunLength(math.inf, batches, tuple(accumulation))
    total = math.inf if epochs in (None, -1) else length.steps_of(max(int(epochs or 0), 1))
    if trainer.max_steps != -1:
        total = min(total, trainer.max_steps)
    length = RunLength(total, batches, length.accumulation)
    setattr(trainer, _LENGTH, length)
    return length


def run_length(trainer: L.Trainer) -> RunLength:
    """Return the length of the run as it was measured last, or measure it."""
    length = getattr(trainer, _LENGTH, None)
    return length if isinstance(length, RunLength) else measure_run(trainer)


def epoch_steps(trainer: L.Trainer, epochs: int) -> float | None:
    """Return the mean optimizer steps of the first epochs, or None if the run is not measured in epochs.

    Args:
        trainer: The Trainer, after the start of a fit.
        epochs: Number of epochs, >= 1.
    """
    steps = run_length(trainer).steps_of(epochs)
    by_epochs = trainer.max_epochs not in (None, -1) and trainer.max_steps == -1 and math.isfinite(steps)
    return steps / epochs if by_epochs else None


def epoch_length_changed(steps: float, before: float) -> bool:
    """Return whether epochs are longer or shorter than before, by more than a few skipped steps.

    Args:
        steps: Optimizer steps per epoch, > 0.
        before: Mean number of steps of the epochs before.
    """
    return abs(before - steps) > _TOLERANCE * steps


def set_up_training_data(trainer: L.Trainer) -> None:
    """Set up the training loader, whose length the schedules need, before the fit does so itself.

    Args:
        trainer: The Trainer, during the setup of a fit.

    Raises:
        ValueError: If ranks have different numbers of batches, which would cause a deadlock.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    hint = (
        "Use a DistributedSampler, which gives each rank as many, or set `limit_train_batches` to the smallest number"
    )
    batches = trainer.num_training_batches
    distributed.check_equal("training batches per epoch", batches, hint, trainer.strategy.root_device)


def set_up_again_on_resume(trainer: L.Trainer) -> None:
    """Make Lightning set up the loader again after it has loaded the checkpoint.

    Lightning restores the state of a loader at its first setup only. Optimizers are configured before the loop state is
    loaded, so a loader that was set up there for its length would restart the epoch.
    """
    if trainer.ckpt_path is not None:
        trainer.fit_loop._combined_loader = None


def check_end(trainer: L.Trainer, length: RunLength) -> None:
    """Refuse a schedule for a run without an end.

    Args:
        trainer: The Trainer.
        length: Length of its run.

    Raises:
        ValueError: If the run is endless, or its end is given in epochs of unknown length.
    """
    if math.isfinite(length.total_steps):
        return
    if trainer.max_epochs in (None, -1):
        hint = 'Set `max_epochs` or `max_steps` on the Trainer, or `lr_schedule="constant"` on the method'
        fail("max_epochs", "end the run for the schedules", trainer.max_epochs, hint)
    hint = 'Set `max_steps` or `limit_train_batches` on the Trainer, or `lr_schedule="constant"` on the method'
    rule = "be replaced by `max_steps` for a training loader without a length"
    fail("max_epochs", rule, trainer.max_epochs, hint)


def warmup_steps(trainer: L.Trainer, length: RunLength, epochs: int, *, is_default: bool, announce: bool) -> int:
    """Return the optimizer steps of the warm-up of the learning rate.

    A default warm-up that does not leave a step after it is cut to a tenth of the run; so is any other under
    ``fast_dev_run`` and in the trial runs of a `Tuner`.

    Args:
        trainer: The Trainer.
        length: Length of its run.
        epochs: Epochs of the warm-up, >= 0.
        is_default: Whether the epochs are the method's default.
        announce: Log a cut.

    Raises:
        ValueError: If a warm-up that is not a default does not fit into the run.
    """
    steps, total = length.steps_of(epochs), length.total_steps
    if math.isfinite(steps) and (steps < total or (steps == total and not is_default)):
        return int(steps)
    trial = bool(trainer.fast_dev_run) or is_trial(trainer)  # type: ignore[attr-defined]
    if not is_default and not trial:
        if math.isinf(steps):
            hint = "Set `limit_train_batches` on the Trainer, or `warmup_epochs=0`"
            fail("warmup_epochs", "be 0 for a loader without a length", epochs, hint)
        rule = f"fit into the {total:g} steps of the run"
        hint = "Shorten the warm-up, or train longer (`max_epochs` or `max_steps` of the Trainer)"
        fail("warmup_epochs", rule, f"{epochs} epochs of {steps / epochs:g} steps", hint)
    cut = int(total // _WARMUP_SHARE) if math.isfinite(total) else 0
    if announce:
        steps_text = f"{steps:g}" if math.isfinite(steps) else "an unknown number of"
        rank_zero_info(
            f"The warm-up of {epochs} epochs ({steps_text} steps) does not fit into the {total:g} steps of the run and "
            f"is cut to {cut} steps; set `warmup_epochs` to change it."
        )
    return cut


def tell_unreached(trainer: L.Trainer, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Tell of arguments in epochs that the run does not reach: what they begin never begins, what they end never ends.

    Those that differ from the method's defaults by a warning, the others in the log. A trial run is too short for most,
    and nothing is told of it.

    Args:
        trainer: The Trainer, whose run has been measured.
        settings: The method's arguments by name, such as ``freeze_last_layer_epochs`` or ``queue_start_epoch``.
        defaults: Their defaults by name.
    """
    length = run_length(trainer)
    if trainer.fast_dev_run or is_trial(trainer) or math.isinf(length.total_steps):  # type: ignore[attr-defined]
        return
    for name, epochs in settings.items():
        if not _BEGINS_OR_ENDS.fullmatch(name) or not isinstance(epochs, int) or epochs <= 0:
            continue  # of another kind in a subclass, or off
        if length.steps_of(epochs) < length.total_steps:
            continue
        part = name.partition("_")[0]
        if 0 in (settings.get(f"{part}_size", 1), settings.get(f"{part}_weight", 1)):  # such as SwAV without a queue
            continue
        tell = rank_zero_info if epochs == defaults.get(name) else rank_zero_warn
        tell(f"The run ends before epoch {epochs}: what `{name}` begins or ends there never begins or ends.")


def global_batch_size(trainer: L.Trainer, length: RunLength) -> int:
    """Return the images per optimizer step: batch size of the training loader x ranks x accumulation.

    Args:
        trainer: The Trainer, whose training loader is set up.
        length: Length of its run.

    Raises:
        ValueError: If the loader has no batch size, or the accumulation changes during the run.
    """
    loader: Any = trainer.train_dataloader
    if trainer.limit_train_batches == 0:  # nothing is trained
        return trainer.world_size
    loader = loader[0] if isinstance(loader, list | tuple) and loader else loader
    batch_size = getattr(loader, "batch_size", None)
    batch_size = batch_size or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(batch_size, int):
        fail("lr", "be given if the loader has no batch size", None, "Pass an absolute `lr`")
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    accumulated = {batches for first, batches in length.accumulation if first < epochs}
    if len(accumulated) > 1:
        hint = "Pass an absolute `lr`: it is scaled with the global batch, which would change during the run"
        fail("lr", "be given if the gradient accumulation changes between epochs", None, hint)
    return batch_size * trainer.world_size * accumulated.pop()


def remember_callbacks(trainer: L.Trainer, callbacks: list[L.Callback]) -> None:
    """Remember the callbacks of a fit, which a `Tuner` replaces during its trial runs."""
    setattr(trainer, _CALLBACKS, callbacks)


def remembered_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """Return the callbacks of `remember_callbacks`."""
    return list(getattr(trainer, _CALLBACKS, ()))


def is_trial(trainer: L.Trainer) -> bool:
    """Return whether this is a trial run of a `Tuner`, for which it has removed the callbacks of the Trainer."""
    present = trainer.callbacks  # type: ignore[attr-defined]
    return any(callback not in present for callback in remembered_callbacks(trainer))
