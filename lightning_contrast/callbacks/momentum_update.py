"""Moving average of the online weights, updated once per real optimizer step."""

import math
from typing import Any, Literal, TypeAlias, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_contrast._checks import check_choice, check_probability, fail
from lightning_contrast.nn.ema import BUFFER_RULES, BufferRule
from lightning_contrast.nn.ema_sharded import Averager, Pairs, check_pairs
from lightning_contrast.runtime.default_callbacks import is_default_of, remove_if_other_module
from lightning_contrast.runtime.optimizer_steps import (
    StepDetector,
    batches_done,
    has_gradients,
    only_forward,
    step_was_skipped,
    total_steps,
)
from lightning_contrast.runtime.schedule_position import schedule_position

Schedule: TypeAlias = Literal["cosine", "linear", "constant"]
_SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant")
_DEFAULTS: tuple[float, float, Schedule] = (0.996, 1.0, "cosine")  # of a module without a momentum of its own


class MomentumUpdate(Callback):
    """Update every momentum network of ``momentum_pairs()`` once per real optimizer step.

    ``target <- m * target + (1 - m) * online`` with the weights after the step, as in BYOL
    (https://arxiv.org/abs/2006.07733) and DINO. The first update uses ``m = start``; the "cosine" schedule then
    increases it as ``end - (end - start) * (1 + cos(pi * k / K)) / 2``, with k the previous optimizer steps
    (``trainer.global_step``, as for all schedules) and K those of the run. There is no update on accumulated
    micro-batches, on steps without gradients, or on steps that a gradient scaler or `NonFiniteGuard` skipped. Under
    manual optimization there is one update per batch in which any optimizer stepped, and the schedule follows the
    finished share of the run, because the number of steps is unknown.

    Accumulation, gradient scaling, DDP, FSDP1 and FSDP2 are supported (shard both networks of a pair alike; FSDP1
    around the whole module only gathers all weights at each update, which is correct but slow). Momentum networks in
    half precision get a float32 copy, kept in the checkpoint, because an update with a momentum of 0.99 or more rounds
    to nothing in bfloat16. The modules of ``step_states()`` are committed after each real step and discarded after each
    skipped one. Logs ``train/momentum``. A resumed run continues exactly where it stopped.

    Differs from MoCo's reference implementation, which updates before the forward pass of the keys: the keys are the
    same, one update later.

    Args:
        start: Momentum of the first update, the share of the target that is kept; in [0, 1]. None: that of the module
            (the ``momentum`` of a method of this package), or 0.996 as in BYOL (1,000 epochs) and DINO. A number other
            than the module's takes precedence, with a warning.
        end: Momentum at the end of the run; in [start, 1]. Not used by the constant schedule. None: that of the module,
            or 1.
        schedule: "cosine", "linear", or "constant". None: that of the module, or "cosine".
        buffers: Rule for floating-point buffers such as the running averages of BatchNorm: "none" leaves them to the
            momentum network's own forward passes (MoCo, BYOL, DINO), "copy" copies those of the online network, "ema"
            averages them. Integer buffers are always copied.

    Raises:
        TypeError: If the module has neither ``momentum_pairs`` nor ``step_states``.
        ValueError: If a momentum is outside [0, 1] or ``end`` is below ``start``, a name is unknown, the networks of a
            pair differ in structure, or an endless run has a schedule other than "constant".
    """

    def __init__(
        self,
        start: float | None = None,
        end: float | None = None,
        schedule: Schedule | None = None,
        buffers: BufferRule = "none",
    ) -> None:
        check_choice("buffers", buffers, BUFFER_RULES)
        self._given = (start, end, schedule)
        self._use(_DEFAULTS)
        self._warned = False
        self._averager = Averager(buffers)
        self._detector = StepDetector()
        self._updates = 0  # in state_dict
        self._total = math.inf
        self._global_step = 0

    @property
    def buffers(self) -> BufferRule:
        """Rule for floating-point buffers."""
        return self._averager.buffers

    @property
    def updates(self) -> int:
        """Number of updates of the run so far."""
        return self._updates

    def momentum_at(self, step: float, total: float) -> float:
        """Return the momentum of an update.

        Args:
            step: Number of updates before it, >= 0; from ``total`` on the momentum is ``end``.
            total: Optimizer steps of the run, > 0; may be infinite for the constant schedule.
        """
        if self.schedule == "constant":
            return self.start
        progress = min(step / total, 1.0)
        remaining = (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1 - progress
        return self.end - (self.end - self.start) * remaining

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module without momentum networks, and a schedule for an endless run."""
        if remove_if_other_module(self, trainer, pl_module) or stage != "fit":
            return
        if not hasattr(pl_module, "momentum_pairs") and not hasattr(pl_module, "step_states"):
            hint = "Return [(online_module, momentum_module), ...] from it, or leave `MomentumUpdate` out"
            fail("pl_module", "have a method `momentum_pairs`", type(pl_module).__name__, hint, TypeError)
        self._resolve(pl_module)
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            self._check_end(math.inf)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the pairs, which ``configure_model`` may have created."""
        pairs = _pairs(pl_module)
        if not pairs and not _step_states(pl_module):
            hint = "Leave `MomentumUpdate` out"
            fail("momentum_pairs", "return at least one pair", pairs, hint)
        check_pairs(pairs, _root(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the optimizers; every strategy has loaded its checkpoint by now."""
        if trainer.global_step == 0:
            self._updates = 0  # a new run of the same callback
        self._global_step = trainer.global_step
        self._total = total_steps(trainer, pl_module)
        has_end = math.isfinite(self._total) or (not pl_module.automatic_optimization and trainer.max_steps > 0)
        self._check_end(self._total if not has_end else 1)
        self._averager.start(_pairs(pl_module), _root(trainer, pl_module))
        self._detector.attach(trainer.optimizers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after a real optimizer step; no update on accumulated micro-batches or skipped steps."""
        before, self._global_step = self._global_step, trainer.global_step
        stepped = self._detector.stepped()
        if stepped and not outputs and pl_module.automatic_optimization:
            # After a training_step that returned None the optimizer steps too, with the gradients that are left. Shards
            # of one rank may have none, so gradients say nothing about the other steps.
            stepped = has_gradients(trainer.optimizers)
        skipped = step_was_skipped(trainer) or only_forward(trainer)
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
        """Remove the optimizer hooks."""
        self._detector.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the optimizer hooks."""
        self._detector.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, and the float32 copies of momentum networks in half precision."""
        return {"updates": self._updates, "masters": self._averager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a resumed run."""
        self._updates = state_dict["updates"]
        self._averager.load_state_dict(state_dict["masters"])

    def _momentum(self, trainer: Trainer, pl_module: LightningModule, global_step: int) -> float:
        """Return the momentum of the current update."""
        if pl_module.automatic_optimization:
            return self.momentum_at(*schedule_position(trainer, global_step, self._total))
        shares = [batches_done(trainer) / self._total]
        if trainer.max_steps > 0:
            shares.append(global_step / trainer.max_steps)
        return self.momentum_at(max(shares), 1.0)

    def _use(self, defaults: tuple[float, float, Schedule]) -> None:
        """Set start, end and schedule: the given ones, else the defaults."""
        start, end, schedule = self._given
        self.start = defaults[0] if start is None else start
        self.end = defaults[1] if end is None else end
        self.schedule = defaults[2] if schedule is None else schedule
        check_probability("start", self.start)
        check_probability("end", self.end)
        check_choice("schedule", self.schedule, _SCHEDULES)
        if self.schedule != "constant" and self.end < self.start:
            fail("end", f"be at least `start` ({self.start})", self.end, 'Swap them, or set schedule="constant"')

    def _resolve(self, pl_module: LightningModule) -> None:
        """Use what the module says for what was not given; warn once about a difference."""
        own = None if is_default_of(self, pl_module) else _own_values(pl_module)
        self._use(own or _DEFAULTS)
        pairs = zip(("start", "end", "schedule"), self._given, own or self._given, strict=True)
        different = [f"{name}={value!r} (not {of!r})" for name, value, of in pairs if value not in (None, of)]
        if different and not self._warned:
            self._warned = True
            given, owner = ", ".join(different), type(pl_module).__name__
            rank_zero_warn(f"`MomentumUpdate` was given {given}, which takes precedence over the momentum of {owner}.")

    def _check_end(self, total: float) -> None:
        """Refuse a schedule for an endless run."""
        if math.isinf(total) and self.schedule != "constant" and self.start != self.end:
            rule = 'be "constant" in an endless run'
            fail("schedule", rule, self.schedule, "Set `max_epochs` or `max_steps` on the Trainer, or the schedule")


def _root(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    return trainer.strategy.model or pl_module


def _pairs(pl_module: LightningModule) -> Pairs:
    """Return the current pairs: strategies may have wrapped or replaced modules."""
    return cast("Pairs", getattr(pl_module, "momentum_pairs", list)())


def _own_values(pl_module: LightningModule) -> tuple[float, float, Schedule] | None:
    """Return start, end and schedule of the module's own default callback, or its ``momentum``, if it has one."""
    for callback in getattr(pl_module, "default_callbacks", list)():
        if isinstance(callback, MomentumUpdate):
            return callback.start, callback.end, callback.schedule
    momentum = getattr(pl_module, "momentum", None)
    return (momentum, 1.0, "cosine") if isinstance(momentum, float) else None


def _step_states(pl_module: LightningModule) -> list[Any]:
    return list(getattr(pl_module, "step_states", list)())
