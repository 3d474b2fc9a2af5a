"""Guard against optimizer steps with NaN or infinite values."""

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

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_choice
from lightning_contrast.runtime.optimizer_steps import clear_skipped, mark_skipped
from lightning_contrast.sharding import clean_name

_RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

Action: TypeAlias = Literal["skip", "raise"]


class NonFiniteGuard(Callback):
    """Detect NaN or infinite losses and gradients before the optimizer steps, and skip the step or raise an error.

    The message names the batch, the step, the rank, and the first bad tensor in the order in which a step computes
    them: the batch, the weights, the loss, the gradients.

    A skipped step changes nothing that the run learns, on any rank: the gradients are set to None, the running
    statistics of BatchNorm (those of momentum networks too) are restored, `MomentumUpdate` updates no momentum network,
    centers and other step states are discarded, and `QueueUpdate` feeds no queue. Counters advance as after a step that
    a gradient scaler skips: ``global_step`` counts it, learning rate schedules move, and ``MomentumUpdate.updates``
    does not count it. Under accumulation the whole step is skipped; keys of its earlier micro-batches are in the queue
    by then, which masks those that are not finite. Weights that are not finite cannot be repaired by skipping steps and
    always raise an error.

    It costs one host read per optimizer step, of two flags that are all-reduced once over the ranks, and a copy of the
    running statistics. With a gradient scaler ("16-mixed") infinite gradients are expected and left to it; only the
    loss is checked. Under manual optimization each optimizer is checked separately. FSDP is supported; strategies that
    own the gradients (DeepSpeed) are not.

    Args:
        action: "skip" the step with a warning, or "raise" an error on all ranks.
        max_in_a_row: Number of consecutive skipped steps that raises an error, >= 1.

    Attributes:
        skipped: Number of skipped steps so far; logged as ``train/skipped_steps`` from the first one on, and kept in
            checkpoints.

    Raises:
        FloatingPointError: During the run, as described above.
        TypeError: If ``max_in_a_row`` is not a whole number.
        ValueError: If an argument is out of range.
    """

    def __init__(self, action: Action = "skip", *, max_in_a_row: int = 20) -> None:
        check_choice("action", action, ("skip", "raise"))
        check_at_least("max_in_a_row", max_in_a_row, 1)
        self.action, self.max_in_a_row = action, max_in_a_row
        self.skipped = 0
        self._in_a_row = 0
        self._statistics = RunningStatistics()
        self._batches: list[int] = []  # of the current optimizer step
        self._bad_losses: list[Tensor] = []  # one flag on the device per backward pass
        self._loss_batches: list[int] = []  # the batch of each flag
        self._batch: Any = None
        self._ends_step = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the running statistics, which strategies no longer move or replace."""
        self._statistics.find(pl_module)
        self._reset_step()
        clear_skipped(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the running statistics at the start of each optimizer step."""
        if not self._batches:
            self._statistics.save()
        self._batches.append(batch_idx)
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss, a scalar, without reading the result on the host."""
        self._bad_losses.append(~loss.detach().isfinite().all())
        self._loss_batches.append(self._batches[-1])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Decide on all ranks alike whether to skip the step."""
        self._ends_step = True
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        bad_loss = torch.stack(self._bad_losses).any() if self._bad_losses else _false(pl_module)
        bad_gradient = _false(pl_module) if is_scaled else has_bad_gradient(optimizer, pl_module.device)
        flags = torch.stack([bad_loss, bad_gradient]).float()
        if not any(distributed.all_reduce_sum(flags).tolist()):  # the only host read of a step
            self._in_a_row = 0
            return
        message, in_weights = self._message(trainer, pl_module, optimizer, check_gradients=not is_scaled)
        self._in_a_row += 1
        if self.action == "raise" or in_weights or self._in_a_row >= self.max_in_a_row:
            raise FloatingPointError(message)
        rank_zero_warn(f"{message} The step is skipped.", category=RuntimeWarning)
        self._skip(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget the optimizer step after its last batch, and log the number of skipped steps."""
        self._batch = None
        if self._ends_step or not self._bad_losses:  # a batch without a loss belongs to no step
            self._reset_step()
        if self.skipped:
            pl_module.log("train/skipped_steps", float(self.skipped))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an unfinished optimizer step."""
        self._reset_step()
        clear_skipped(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget an unfinished optimizer step."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of skipped steps."""
        self.skipped = state_dict["skipped"]

    def _skip(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Undo what the step has changed so far, and keep the optimizer and other callbacks from changing more."""
        self.skipped += 1
        mark_skipped(trainer)
        unscales_in_step = getattr(optimizer, "_step_supports_amp_scaling", False)
        if getattr(trainer.precision_plugin, "scaler", None) is None or not unscales_in_step:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # the optimizer's step does nothing without gradients
        self._statistics.restore()
        for state in getattr(pl_module, "step_states", list)():
            state.discard()

    def _reset_step(self) -> None:
        self._batches, self._bad_losses, self._loss_batches = [], [], []
        self._batch, self._ends_step = None, False

    def _message(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, *, check_gradients: bool
    ) -> tuple[str, bool]:
        """Return a message that is the same on all ranks, and whether weights are not finite."""
        bad = [n for n, flag in zip(self._loss_batches, self._bad_losses, strict=True) if bool(flag)]
        first_bad = bad[0] if bad else None
        batch = self._batch if first_bad in (None, self._batches[-1]) else None  # only the last batch is kept
        found = first_nonfinite(pl_module, optimizer if check_gradients else None, batch, has_bad_loss=bool(bad))
        reports: list[Any] = [(found, first_bad)]
        if distributed.is_distributed():
            reports = [None] * distributed.world_size()
            dist.all_gather_object(reports, (found, first_bad))
        rank = min(range(len(reports)), key=lambda r: (reports[r][0].order, r))
        tensor, number = reports[rank]
        if number is not None or len(self._batches) == 1:
            batches = f"batch {self._batches[-1] if number is None else number}"
        else:
            batches = f"batches {self._batches[0]} to {self._batches[-1]}"
        on_rank = f" on rank {rank}" if len(reports) > 1 else ""
        text = (
            f"Values that are not finite in the optimizer step after step {trainer.global_step} (epoch "
            f"{trainer.current_epoch}, {batches}){on_rank}: the first is {tensor.text}."
        )
        if tensor.in_weights:
            text += " The weights are already not finite; resume from an earlier checkpoint."
        elif self._in_a_row + 1 >= self.max_in_a_row and self.action == "skip":
            text += f" {self._in_a_row + 1} steps in a row were not finite: lower the learning rate, or check the data."
        return text, tensor.in_weights


def _false(pl_module: LightningModule) -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=pl_module.device)


@dataclass(frozen=True)
class NonFiniteTensor:
    """The first tensor of a rank that is not finite.

    Args:
        order: Position in the order of a step; a rank without such a tensor comes last.
        text: Description for messages.
        in_weights: Whether it is a weight.
    """

    order: int
    text: str
    in_weights: bool = False


class RunningStatistics:
    """Copies of the running statistics of all normalization layers, of online and momentum networks."""

    def __init__(self) -> None:
        self._buffers: list[tuple[nn.Module, str]] = []
        self._copies: list[Tensor] = []

    def find(self, module: nn.Module) -> None:
        """Find the normalization layers of a module."""
        layers = [layer for layer in module.modules() if isinstance(layer._buffers.get("running_mean"), Tensor)]
        names = _RUNNING_STATISTICS
        self._buffers = [(layer, name) for layer in layers for name in names if layer._buffers.get(name) is not None]
        self._copies = []

    @torch.no_grad()
    def save(self) -> None:
        """Copy the statistics."""
        now = self._now()
        if len(self._copies) != len(now) or any(a.device != b.device for a, b in zip(now, self._copies, strict=True)):
            self._copies = [tensor.clone() for tensor in now]
        elif now:
            _copy(now, self._copies)

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back."""
        if self._copies:
            _copy(self._copies, self._now())

    def _now(self) -> list[Tensor]:
        found = [layer._buffers[name] for layer, name in self._buffers]
        return [tensor for tensor in found if tensor is not None]

    def __reduce__(self) -> tuple[type["RunningStatistics"], tuple[()]]:
        """Copy and pickle without the layers, which belong to the module of this process."""
        return RunningStatistics, ()


def has_bad_gradient(optimizer: Optimizer, device: torch.device) -> Tensor:
    """Return whether any gradient of an optimizer is not finite; of sharded gradients, this rank's part is checked.

    Args:
        optimizer: Optimizer of the gradients.
        device: Device of the result.

    Returns:
        A scalar, bool.
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


def first_nonfinite(
    module: nn.Module, optimizer: Optimizer | None, batch: Any, *, has_bad_loss: bool
) -> NonFiniteTensor:
    """Find this rank's first tensor that is not finite, in the order of a step; synchronizes with the device.

    Args:
        module: The LightningModule.
        optimizer: Optimizer of the gradients to check; None checks no gradients.
        batch: The batch of the bad loss, or None if it was not kept.
        has_bad_loss: Whether a loss of this rank is not finite.

    Returns:
        The first of the tensors, of any shape; a placeholder if this rank has none.
    """
    for name, tensor in _leaves(batch, "batch"):
        if _is_bad(tensor):
            return NonFiniteTensor(0, f"{_kind(tensor)} in `{name}`")
    for name, parameter in module.named_parameters():
        if _is_bad(parameter):
            return NonFiniteTensor(1, f"{_kind(parameter)} in the weights `{clean_name(name)}`", in_weights=True)
    if has_bad_loss:
        return NonFiniteTensor(2, "the loss")
    groups = optimizer.param_groups if optimizer is not None else []
    own = {id(parameter) for group in groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if id(parameter) in own and parameter.grad is not None and _is_bad(parameter.grad):
            return NonFiniteTensor(3, f"{_kind(parameter.grad)} in the gradient of `{clean_name(name)}`")
    return NonFiniteTensor(4, "on another rank")


def _is_bad(tensor: Tensor) -> bool:
    values = _values(tensor)
    return values.is_floating_point() and not bool(values.isfinite().all())


def _kind(tensor: Tensor) -> str:
    return "NaN" if bool(_values(tensor).isnan().any()) else "infinity"


def _values(tensor: Tensor) -> Tensor:
    """Return the values of this rank."""
    tensor = tensor.detach()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local._values() if local.is_sparse else local


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy tensors, all floats in one call and all integers in another."""
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
