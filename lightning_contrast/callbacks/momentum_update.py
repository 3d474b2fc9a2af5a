"""Momentum networks that follow their online networks, once per real optimizer step."""

import math
from typing import Any, Literal, TypeAlias, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_contrast._checks import check_choice, check_probability, fail
from lightning_contrast.nn.ema import BUFFER_RULES, BufferRule
from lightning_contrast.nn.ema_sharded import Averager, Pairs, check_pairs
from lightning_contrast.runtime.default_callbacks import drop_if_foreign
from lightning_contrast.runtime.optimizer_steps import (
    StepWatch,
    batches_done,
    has_gradients,
    step_was_skipped,
    total_steps,
)
from lightning_contrast.runtime.schedule_position import planned

Schedule: TypeAlias = Literal["cosine", "linear", "constant"]
_SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant")


class MomentumUpdate(Callback):
    """Moves every momentum network of ``momentum_pairs()`` once per real optimizer step.

    ``target <- m * target + (1 - m) * online`` with the weights after the step, as in BYOL
    (https://arxiv.org/abs/2006.07733) and DINO. The first update uses ``m = start``; "cosine" then rises as
    ``end - (end - start) * (1 + cos(pi * k / K)) / 2``, with k the updates before and K the optimizer steps of the run.
    A micro-batch of an accumulation moves nothing, nor does a step that the gradient scaler skipped or whose
    ``training_step`` returned None. Under manual optimization there is one update per batch in which any optimizer
    stepped, and the schedule follows the share of the run that is done, since nobody knows how often it will step.

    It works with accumulation, gradient scaling, DDP, FSDP1 and FSDP2 (shard both networks of a pair alike; FSDP1
    wrapped only around the whole module gathers all weights at each update, which is right and slow). Momentum networks
    in half precision get a float32 master, kept in the checkpoint, because an update with a momentum of 0.99 or more
    vanishes in bfloat16. The modules of ``step_states()`` are committed after each real step and discarded after
    each skipped one. Logs ``train/momentum``. A resumed run goes on exactly where it stopped.

    Differs from them: MoCo's program updates before the key forward pass, which gives the same keys one update later.

    Args:
        start: Share that is kept at the first update; in [0, 1]. 0.996 is BYOL's (1,000 epochs) and DINO's.
        end: Share that is kept at the end of the run; in [start, 1]. Not used by the constant schedule.
        schedule: "cosine", "linear", or "constant".
        buffers: What becomes of floating buffers such as BatchNorm's running averages: "none" leaves them to the
            momentum network's own forward passes (MoCo, BYOL, DINO), "copy" takes the online network's, "ema" averages
            them. Counters are always copied.

    Raises:
        ValueError: If a momentum lies outside [0, 1] or they fall, a name is unknown, the pairs differ in structure, or
            a schedule other than "constant" meets a run without an end.
        TypeError: If the module has neither ``momentum_pairs`` nor ``step_states``.
    """

    def __init__(
        self,
        start: float = 0.996,
        end: float = 1.0,
        schedule: Schedule = "cosine",
        buffers: BufferRule = "none",
    ) -> None:
        check_probability("start", start)
        check_probability("end", end)
        check_choice("schedule", schedule, _SCHEDULES)
        check_choice("buffers", buffers, BUFFER_RULES)
        if schedule != "constant" and end < start:
            fail("end", f"be at least `start` ({start})", end, 'Swap them, or set schedule="constant"')
        self.start, self.end, self.schedule = start, end, schedule
        self._averager = Averager(buffers)
        self._watch = StepWatch()
        self._updates = 0  # in state_dict: trainer.global_step also counts skipped steps
        self._total = math.inf
        self._global_step = 0

    @property
    def buffers(self) -> BufferRule:
        """What becomes of floating buffers."""
        return self._averager.buffers

    @property
    def updates(self) -> int:
        """How many updates the run has had."""
        return self._updates

    def momentum_at(self, step: float, total: float) -> float:
        """Return the momentum of the update that ``step`` others came before.

        Args:
            step: Updates before this one, >= 0; from ``total`` on the momentum stays at its end.
            total: Optimizer steps of the run, > 0; infinity where only the constant schedule is asked for.
        """
        if self.schedule == "constant":
            return self.start
        progress = min(step / total, 1.0)
        remaining = (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1 - progress
        return self.end - (self.end - self.start) * remaining

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that has nothing to move, and a schedule for a run without an end."""
        if drop_if_foreign(self, trainer, pl_module) or stage != "fit":
            return
        if not hasattr(pl_module, "momentum_pairs") and not hasattr(pl_module, "step_states"):
            hint = "Return [(online_module, momentum_module), ...] from it, or leave `MomentumUpdate` out"
            fail("pl_module", "have a method `momentum_pairs`", type(pl_module).__name__, hint, TypeError)
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            self._check_end(math.inf)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the pairs, which may not exist before ``configure_model``."""
        pairs = _pairs(pl_module)
        if not pairs and not _step_states(pl_module):
            hint = "Leave `MomentumUpdate` out"
            fail("momentum_pairs", "give at least one pair", pairs, hint)
        check_pairs(pairs, _root(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimizers; checkpoints are loaded by now on every strategy."""
        if trainer.global_step == 0:
            self._updates = 0  # a new run of the same callback
        self._global_step = trainer.global_step
        self._total = total_steps(trainer, pl_module)
        has_end = math.isfinite(self._total) or (not pl_module.automatic_optimization and trainer.max_steps > 0)
        self._check_end(self._total if not has_end else 1)
        self._averager.start(_pairs(pl_module), _root(trainer, pl_module))
        self._watch.open(trainer.optimizers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once per real optimizer step, so that gradient accumulation does not speed it up."""
        before, self._global_step = self._global_step, trainer.global_step
        stepped = self._watch.take()
        if stepped and not outputs and pl_module.automatic_optimization:
            # A training_step that returned None still lets the optimizer step, with the gradients there are.
            stepped = has_gradients(trainer.optimizers)
        skipped = step_was_skipped(trainer)
        if skipped or not stepped:
            if skipped or before != trainer.global_step:
                for state in _step_states(pl_module):
                    state.discard()
            return
        momentum = self._momentum(trainer, pl_module, before)
        pairs = _pairs(pl_module)
        self._averager.update(pairs, _root(trainer, pl_module), momentum)
        for state in _step_states(pl_module):
            state.commit()
        self._updates += 1
        if pairs:
            pl_module.log("train/momentum", momentum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizers alone."""
        self._watch.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone."""
        self._watch.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, and the float32 masters of momentum networks in half precision."""
        return {"updates": self._updates, "masters": self._averager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a run that is resumed."""
        self._updates = state_dict["updates"]
        self._averager.load_state_dict(state_dict["masters"])

    def _momentum(self, trainer: Trainer, pl_module: LightningModule, global_step: int) -> float:
        """Return the momentum of the update that is due now."""
        if pl_module.automatic_optimization:
            return self.momentum_at(*planned(trainer, self._updates, self._total))
        shares = [batches_done(trainer) / self._total]
        if trainer.max_steps > 0:
            shares.append(global_step / trainer.max_steps)
        return self.momentum_at(max(shares), 1.0)

    def _check_end(self, total: float) -> None:
        """Refuse a schedule for a run without an end."""
        if math.isinf(total) and self.schedule != "constant" and self.start != self.end:
            rule = 'be "constant" in a run without an end'
            fail("schedule", rule, self.schedule, "Set `max_epochs` or `max_steps` on the Trainer, or the schedule")


def _root(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    return trainer.strategy.model or pl_module


def _pairs(pl_module: LightningModule) -> Pairs:
    """Return the pairs as they are now: strategies may have wrapped or replaced modules."""
    return cast("Pairs", getattr(pl_module, "momentum_pairs", list)())


def _step_states(pl_module: LightningModule) -> list[Any]:
    return list(getattr(pl_module, "step_states", list)())
