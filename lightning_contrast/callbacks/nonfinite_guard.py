"""A guard that keeps steps with values that are not finite out of everything that lasts."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_choice
from lightning_contrast.nn.ema import clean_name
from lightning_contrast.runtime.optimizer_steps import clear_skipped, mark_skipped, step_was_skipped

_AVERAGES = ("running_mean", "running_var", "num_batches_tracked")


Action: TypeAlias = Literal["skip", "raise"]


class NonFiniteGuard(Callback):
    """Finds losses and gradients that are NaN or infinite before the optimizer steps, and skips the step or raises.

    The message names the batch, the step, the rank, and the first bad tensor in the order in which a step makes them:
    the batch, the weights, the loss, the gradients.

    A skipped step leaves no trace on any rank: the gradients become None, the running averages of BatchNorm (those of
    momentum networks, too) go back to where they were, `MomentumUpdate` moves no momentum network, centres and other
    step states are discarded, `QueueUpdate` feeds no queue, ``global_step`` does not count it, and schedulers with
    ``interval="step"`` do not move. Under accumulation the whole step is skipped; keys of its earlier micro-batches are
    in the queue by then, which marks those that are not finite as unfilled. Weights that are not finite themselves
    cannot be mended by skipping and always raise.

    It costs one host read in each optimizer step: of two flags, all-reduced once over the ranks; and a copy of the
    running averages. With a gradient scaler ("16-mixed") infinite gradients are its normal business and left to it;
    only the loss is looked at. Under manual optimization each optimizer is looked at alone, and schedules are the
    module's own business. FSDP works; strategies that own the gradients (DeepSpeed) do not.

    Args:
        action: "skip" the step with a warning, or "raise" an error on all ranks.
        max_in_a_row: Skipped steps one after the other, >= 1, at which it raises after all.

    Attributes:
        skipped: How many steps were skipped so far; logged as ``train/skipped_steps`` from the first one on, and kept
            in checkpoints.

    Raises:
        FloatingPointError: In the run, as above.
        ValueError: If an argument is none of those.
        TypeError: If ``max_in_a_row`` is not a whole number.
    """

    def __init__(self, action: Action = "skip", *, max_in_a_row: int = 20) -> None:
        check_choice("action", action, ("skip", "raise"))
        check_at_least("max_in_a_row", max_in_a_row, 1)
        self.action, self.max_in_a_row = action, max_in_a_row
        self.skipped = 0
        self._in_a_row = 0
        self._statistics = RunningStatistics()
        self._batches: list[int] = []  # of the step that is under way
        self._bad_losses: list[Tensor] = []  # one flag on the device for each backward pass, with its batch
        self._loss_batches: list[int] = []
        self._batch: Any = None
        self._ends_step = False
        self._paused: list[Any] = []
        self._counted = False
        self._handle: RemovableHandle | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the running averages, which are where they stay by now."""
        self._statistics.find(pl_module)
        self._forget()
        clear_skipped(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the running averages at the start of each optimizer step."""
        if not self._batches:
            self._statistics.keep()
        self._batches.append(batch_idx)
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss, on its device."""
        self._bad_losses.append(~loss.detach().isfinite().all())
        self._loss_batches.append(self._batches[-1])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Decide, on all ranks alike, whether the step may be made."""
        self._ends_step = True
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        bad_loss = torch.stack(self._bad_losses).any() if self._bad_losses else _false(pl_module)
        bad_gradient = _false(pl_module) if is_scaled else has_bad_gradient(optimizer, pl_module.device)
        flags = torch.stack([bad_loss, bad_gradient]).float()
        if not any(distributed.all_reduce_sum(flags).tolist()):  # the one host read of a step
            self._in_a_row = 0
            return
        message, is_hopeless = self._message(trainer, pl_module, optimizer, look_at_gradients=not is_scaled)
        self._in_a_row += 1
        if self.action == "raise" or is_hopeless or self._in_a_row >= self.max_in_a_row:
            raise FloatingPointError(message)
        rank_zero_warn(f"{message} The step is skipped.", category=RuntimeWarning)
        self._skip(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the schedules go on, and forget the step if this was its last batch."""
        if step_was_skipped(trainer) and self._counted:
            self._uncount(trainer, pl_module)  # a gradient scaler made no step at all
        self._resume_schedules()
        self._batch = None
        if self._ends_step or not self._bad_losses:  # a batch without a loss joins no step
            self._forget()
        if self.skipped:
            pl_module.log("train/skipped_steps", float(self.skipped))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a step that was under way."""
        self._forget()
        clear_skipped(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the schedules as they were."""
        self._resume_schedules()
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count of a run that is resumed."""
        self.skipped = state_dict["skipped"]

    def _skip(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Undo what the step has done so far, and keep it from doing more."""
        self.skipped += 1
        mark_skipped(trainer)
        unscales_in_step = getattr(optimizer, "_step_supports_amp_scaling", False)
        if getattr(trainer.precision_plugin, "scaler", None) is None or not unscales_in_step:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        self._statistics.restore()
        for state in getattr(pl_module, "step_states", list)():
            state.discard()
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and pl_module.automatic_optimization:
                config.interval = "skipped"  # neither "step" nor "epoch": Lightning passes it over
                self._paused.append(config)
        self._counted = True

        # After the optimizer, which does nothing without gradients, and before Lightning counts the step.
        self._handle = optimizer.register_step_post_hook(lambda *_: self._uncount(trainer, pl_module))

    def _uncount(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a step out of ``global_step``: before Lightning has added it, or after."""
        if not self._counted:
            return
        self._counted = False
        if self._handle is not None:
            self._handle.remove()
        loop = trainer.fit_loop.epoch_loop
        if pl_module.automatic_optimization:
            progress: Any = loop.automatic_optimization.optim_progress.optimizer.step
        else:
            progress = loop.manual_optimization.optim_step_progress
        for tracker in (progress.total, progress.current):
            tracker.ready -= 1
            tracker.completed -= 1

    def _resume_schedules(self) -> None:
        for config in self._paused:
            config.interval = "step"
        self._paused = []

    def _forget(self) -> None:
        self._batches, self._bad_losses, self._loss_batches = [], [], []
        self._batch, self._ends_step, self._counted = None, False, False

    def _message(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, *, look_at_gradients: bool
    ) -> tuple[str, bool]:
        """Return what is wrong, in words that are the same on all ranks, and whether the weights are."""
        bad = [n for n, flag in zip(self._loss_batches, self._bad_losses, strict=True) if bool(flag)]
        at = bad[0] if bad else None
        batch = self._batch if at in (None, self._batches[-1]) else None  # the others are not kept
        found = describe(pl_module, optimizer if look_at_gradients else None, batch, has_bad_loss=bool(bad))
        reports: list[Any] = [(found, at)]
        if distributed.is_distributed():
            reports = [None] * distributed.world_size()
            dist.all_gather_object(reports, (found, at))
        rank = min(range(len(reports)), key=lambda r: (reports[r][0].order, r))
        what, number = reports[rank]
        if number is not None or len(self._batches) == 1:
            batches = f"batch {self._batches[-1] if number is None else number}"
        else:
            batches = f"batches {self._batches[0]} to {self._batches[-1]}"
        on_rank = f" on rank {rank}" if len(reports) > 1 else ""
        text = (
            f"Values that are not finite in the optimizer step after step {trainer.global_step} (epoch "
            f"{trainer.current_epoch}, {batches}){on_rank}: the first is {what.text}."
        )
        if what.in_weights:
            text += " No skipped step mends weights: go on from a checkpoint."
        elif self._in_a_row + 1 >= self.max_in_a_row and self.action == "skip":
            text += f" It is the {self._in_a_row + 1}. step in a row: lower the learning rate, or look at the data."
        return text, what.in_weights


def _false(pl_module: LightningModule) -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=pl_module.device)


@dataclass(frozen=True)
class Finding:
    """The first bad tensor of a rank.

    Args:
        order: Where it comes in a step; a rank that has none comes last.
        text: What it is, in words.
        in_weights: Whether it is a weight.
    """

    order: int
    text: str
    in_weights: bool = False


class RunningStatistics:
    """Copies of the running averages of all normalisation layers, online and momentum."""

    def __init__(self) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._kept: list[Tensor] = []

    def find(self, module: nn.Module) -> None:
        """Look for the layers, anew for each fit."""
        layers = [layer for layer in module.modules() if isinstance(layer._buffers.get("running_mean"), Tensor)]
        self._places = [(layer, name) for layer in layers for name in _AVERAGES if layer._buffers.get(name) is not None]
        self._kept = []

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the averages."""
        now = self._now()
        if len(self._kept) != len(now) or any(a.device != b.device for a, b in zip(now, self._kept, strict=True)):
            self._kept = [tensor.clone() for tensor in now]
        elif now:
            _copy(now, self._kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back."""
        if self._kept:
            _copy(self._kept, self._now())

    def _now(self) -> list[Tensor]:
        found = [layer._buffers[name] for layer, name in self._places]
        return [tensor for tensor in found if tensor is not None]

    def __reduce__(self) -> tuple[type["RunningStatistics"], tuple[()]]:
        """Copy and pickle as empty: the layers belong to the module of this process."""
        return RunningStatistics, ()


def has_bad_gradient(optimizer: Optimizer, device: torch.device) -> Tensor:
    """Return whether any gradient of an optimizer is not finite, on the device; of shards, this rank's.

    Args:
        optimizer: Its parameters' gradients are looked at.
        device: Where the answer lies.
    """
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradient = _values(parameter.grad)
                if gradient.numel():
                    buckets.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    # The largest absolute value cannot overflow, as a sum of squares can.
    flags = [~torch.stack(torch._foreach_norm(bucket, math.inf)).isfinite().all() for bucket in buckets.values()]
    if not flags:
        return torch.zeros((), dtype=torch.bool, device=device)
    return torch.stack([flag.to(device) for flag in flags]).any()


def describe(module: nn.Module, optimizer: Optimizer | None, batch: Any, *, has_bad_loss: bool) -> Finding:
    """Return the first bad tensor of this rank, in the order in which a step makes them; it may wait for the device.

    Args:
        module: The LightningModule.
        optimizer: Its gradients are looked at; None: no gradients.
        batch: The batch of the bad loss, or None where it is not at hand.
        has_bad_loss: Whether a loss of this rank is not finite.
    """
    for name, tensor in _leaves(batch, "batch"):
        if _is_bad(tensor):
            return Finding(0, f"{_kind(tensor)} in `{name}`")
    for name, parameter in module.named_parameters():
        if _is_bad(parameter):
            return Finding(1, f"{_kind(parameter)} in the weights `{clean_name(name)}`", in_weights=True)
    if has_bad_loss:
        return Finding(2, "the loss")
    groups = optimizer.param_groups if optimizer is not None else []
    own = {id(parameter) for group in groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if id(parameter) in own and parameter.grad is not None and _is_bad(parameter.grad):
            return Finding(3, f"{_kind(parameter.grad)} in the gradient of `{clean_name(name)}`")
    return Finding(4, "on another rank")


def _is_bad(tensor: Tensor) -> bool:
    values = _values(tensor)
    return values.is_floating_point() and not bool(values.isfinite().all())


def _kind(tensor: Tensor) -> str:
    return "NaN" if bool(_values(tensor).isnan().any()) else "infinity"


def _values(tensor: Tensor) -> Tensor:
    """Return the values that this rank holds."""
    tensor = tensor.detach()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local._values() if local.is_sparse else local


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy tensors, all floats at once and all integers at once."""
    for is_float in (True, False):
        chosen = [i for i, tensor in enumerate(sources) if tensor.is_floating_point() == is_float]
        if chosen:
            torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for key, item in enumerate(value):
            yield from _leaves(item, f"{name}[{key}]")
