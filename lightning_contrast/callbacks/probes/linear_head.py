"""The linear model of the online probe: weights, running statistics and optimizer step, equal on every rank."""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_contrast._checks import fail, require
from lightning_contrast.callbacks.probes.base import Step
from lightning_contrast.callbacks.probes.metrics import MaskedAccuracy
from lightning_contrast.callbacks.probes.tasks import ClassTask, Task
from lightning_contrast.distributed import all_reduce_sum, batch_sizes

SGD_MOMENTUM = 0.9

MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Creates the optimizer of the given parameters."""

MakeSchedule: TypeAlias = Callable[[Optimizer], LRScheduler]
"""Creates the learning rate schedule of an optimizer."""

STATISTICS_MOMENTUM = 0.02
"""Share of a batch in the running statistics after 1 / 0.02 = 50 batches; before, all batches weigh the same."""

CLIP = 10.0
"""Bound of the standardized features, so that a sudden change of the backbone cannot destroy the classifier."""

T = TypeVar("T")


class LinearHead(nn.Module):
    """Linear model on features standardized by running statistics, in float32 with or without autocast.

    The weights start at zero: the usual start of a convex problem, which draws no random numbers.

    Args:
        width: Number of features F.
        num_outputs: Number of outputs C: classes, labels or targets.
        device: Device of the features.
        task: What the model learns; None is classification with C classes.
    """

    mean: Tensor
    var: Tensor
    target_mean: Tensor
    target_var: Tensor
    target_batches: Tensor
    class_counts: Tensor

    def __init__(self, width: int, num_outputs: int, device: torch.device, task: Task | None = None) -> None:
        super().__init__()
        self.task = ClassTask(num_outputs) if task is None else task
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.weight = nn.Parameter(torch.zeros(num_outputs, width, **options))
        self.bias = nn.Parameter(torch.zeros(num_outputs, **options))
        self.register_buffer("mean", torch.zeros(width, **options))
        self.register_buffer("var", torch.ones(width, **options))
        if self.task.standardizes:
            self.register_buffer("target_mean", torch.zeros(num_outputs, **options))
            self.register_buffer("target_var", torch.ones(num_outputs, **options))
            self.register_buffer("target_batches", torch.zeros(1, **options))  # some batches have no targets
        if self.task.balances:
            self.register_buffer("class_counts", torch.zeros(num_outputs, **options))
        given = getattr(self.task, "weights", None)
        self._weights: Tensor | None = None if given is None else given.to(device)
        self.batches = 0

    @property
    def width(self) -> int:
        """Number of features F."""
        return self.weight.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits, or the predicted numbers, in float32.

        Args:
            features: ``(B, F)``.

        Returns:
            ``(B, C)``, float32.
        """
        with torch.autocast(features.device.type, enabled=False):
            scale = _bounded_variance(self.mean, self.var).rsqrt()
            outputs = self._linear((features.float() - self.mean) * scale)
            if self.task.standardizes:
                target_std = _bounded_variance(self.target_mean, self.target_var).sqrt()
                outputs = outputs * target_std + self.target_mean
            return outputs

    def gradient(self, features: Tensor, targets: Tensor, valid: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Set ``.grad`` to the gradient of the mean loss over all ranks, and update the running statistics.

        One all-reduce carries the gradients, the loss and the sums for the statistics. The statistics are updated
        afterwards: a step uses those of the steps before it, which are equal on all ranks.

        Args:
            features: ``(B, F)``, float32, finite.
            targets: Targets of the task, ``(B, ...)``.
            valid: ``(B,)``, bool; False excludes an image from the loss.
            finite: ``(B,)``, bool; False excludes an image from the statistics of the features.

        Returns:
            The outputs ``(B, C)`` and the mean loss over all ranks, a scalar; both detached.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self._gradient(features.float(), targets, valid, finite)

    def _gradient(self, features: Tensor, targets: Tensor, valid: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        counts = finite.to(features.dtype).unsqueeze(1)  # (B, 1)
        if self.batches == 0:
            _initialize(self.mean, self.var, features, counts)
        variance = _bounded_variance(self.mean, self.var)
        scale = variance.rsqrt()
        standardized = (features - self.mean) * scale
        targets = self.task.masked(targets, valid)
        if self.task.standardizes:
            target_counts = valid.to(features.dtype).unsqueeze(1)
            if self.batches == 0:
                _initialize(self.target_mean, self.target_var, targets, target_counts)
            target_variance = _bounded_variance(self.target_mean, self.target_var)
            target_scale = target_variance.rsqrt()
            targets = ((targets - self.target_mean) * target_scale).clamp(-CLIP, CLIP)
        with torch.enable_grad():
            outputs = self._linear(standardized)
            loss, row_weights = self.task.loss(outputs, targets, valid, self._class_weights())
            grads = torch.autograd.grad(loss, (self.weight, self.bias))

        # Each kernel launch costs an accelerator more than its arithmetic here, so all sums over the batch are one.
        width = standardized.shape[1]
        columns, widths = [row_weights.unsqueeze(1), *_moments(standardized, counts)], [1, 1, 2 * width]
        if self.task.standardizes:
            columns, widths = columns + _moments(targets, target_counts), [*widths, 1, 2 * self.task.outputs]
        if self.task.balances:
            classes = torch.arange(self.task.outputs, device=targets.device)
            seen = (targets.unsqueeze(1) == classes) & valid.unsqueeze(1)
            columns, widths = [*columns, seen.to(features.dtype)], [*widths, self.task.outputs]
        sums = torch.cat(columns, dim=1).sum(dim=0)
        averaged = [*(grad.view(-1) for grad in grads), loss.detach().view(1)]
        flat = all_reduce_sum(torch.cat([*averaged, sums]))
        averaged_sums, weight, *moments = torch.split(flat, [len(flat) - len(sums), *widths])

        means = averaged_sums / weight.clamp(min=torch.finfo(weight.dtype).tiny)  # 0 where no image is valid
        grad, bias, mean_loss = torch.split(means, [part.numel() for part in averaged])
        self.weight.grad, self.bias.grad = grad.view_as(self.weight), bias
        self.batches += 1
        share = max(1 / self.batches, STATISTICS_MOMENTUM)
        _update(self.mean, self.var, moments[:2], variance, scale, share)
        if self.task.standardizes:
            self.target_batches.add_(moments[2] > 0)
            target_share = self.target_batches.clamp(min=1.0).reciprocal().clamp(min=STATISTICS_MOMENTUM)
            _update(self.target_mean, self.target_var, moments[2:4], target_variance, target_scale, target_share)
        if self.task.balances:
            self.class_counts.add_(moments[-1])
        mean_loss, factor = mean_loss.squeeze(0), self.task.logged_factor()
        return outputs.detach(), mean_loss if factor == 1.0 else mean_loss * factor

    def _linear(self, standardized: Tensor) -> Tensor:
        return F.linear(standardized.clamp(-CLIP, CLIP), self.weight, self.bias)

    def _class_weights(self) -> Tensor | None:
        """Return the class weights (C,): the given ones, or N / (C n_c) from the class counts so far."""
        if not self.task.balances:
            return self._weights
        total = self.class_counts.sum()
        return torch.where(total > 0, total / (len(self.bias) * self.class_counts.clamp(min=1.0)), 1.0)


def _bounded_variance(mean: Tensor, var: Tensor) -> Tensor:
    """Return the variance with a lower bound that keeps constant features from being divided by rounding errors."""
    floor = torch.addcmul(var.mean() * 1e-12 + 1e-30, mean, mean, value=1e-10)
    return var.maximum(floor)


def _initialize(mean: Tensor, var: Tensor, values: Tensor, counts: Tensor) -> None:
    """Set the statistics to those of the first batch, in two passes because the scale of the values is unknown."""
    sums = all_reduce_sum(torch.cat([(values * counts).sum(dim=0), counts.sum().view(1)]))
    total = sums[-1].clamp(min=1.0)
    mean.copy_(sums[:-1] / total)
    squares = all_reduce_sum(((values - mean).square() * counts).sum(dim=0))
    var.copy_(torch.where(sums[-1] > 0, squares / total, 1.0))


def _moments(standardized: Tensor, counts: Tensor) -> list[Tensor]:
    """Return the counts (B, 1), the counted values (B, F) and their squares (B, F), row by row."""
    counted = standardized * counts
    return [counts, counted, counted * standardized]


def _update(
    mean: Tensor, var: Tensor, moments: list[Tensor], variance: Tensor, scale: Tensor, share: float | Tensor
) -> None:
    """Move running statistics towards the mean and variance of a batch.

    Args:
        mean: Running mean, ``(F,)``.
        var: Running variance, ``(F,)``.
        moments: Number of rows, ``(1,)``, and the sums of the standardized values and of their squares, ``(2 F,)``.
        variance: What the values were standardized with, ``(F,)``.
        scale: Its inverse square root, ``(F,)``.
        share: Share of the batch in the new statistics, in 0..1; 0 is used for a batch without rows.
    """
    rows, sums = moments
    share = torch.clamp(rows, max=share) if isinstance(share, float) else torch.minimum(rows, share)
    first, second = (sums / rows.clamp(min=1.0)).chunk(2)
    first_squared = first.square()
    # The variance of the batch and that of the move of the mean: second - first^2 + (1 - share) first^2
    spread = torch.addcmul(second.maximum(first_squared), first_squared, share, value=-1.0)
    var.lerp_(spread * variance, share)
    mean.addcdiv_(first * share, scale)


def default_lr(batch: int, width: int) -> float:
    """Return a learning rate for SGD with momentum 0.9 that needs no tuning.

    Args:
        batch: Images per step on all ranks, B: a larger batch has less noise and allows larger steps.
        width: Number of features F: the curvature of the loss is proportional to it.
    """
    return min(0.1, min(math.sqrt(batch), 16.0) / width)


def to_cpu(value: T) -> T:
    """Copy nested dicts and lists, with their tensors on the CPU."""
    copied: Any = value
    if isinstance(value, Tensor):
        copied = value.detach().cpu().clone()
    elif isinstance(value, dict):
        copied = {key: to_cpu(item) for key, item in value.items()}
    elif isinstance(value, list):
        copied = [to_cpu(item) for item in value]
    return copied  # type: ignore[no-any-return]  # of the type that it copies


class HeadTrainer:
    """Trains the linear model of one layer.

    Args:
        owner: Name of the probe and the layer, for messages.
        task: What the model learns.
        lr: Learning rate of SGD; None derives it from the batch and the width.
        optimizer: Creates the optimizer from the parameters; None is SGD with momentum 0.9.
        schedule: Creates the learning rate schedule from the optimizer, stepped once per step; None is constant.
    """

    def __init__(
        self,
        owner: str,
        task: Task,
        *,
        lr: float | None,
        optimizer: MakeOptimizer | None,
        schedule: MakeSchedule | None,
    ) -> None:
        self.owner, self.task, self.lr = owner, task, lr
        self._make_optimizer, self._make_schedule = optimizer, schedule
        self.head: LinearHead | None = None
        self.optimizer: Optimizer | None = None
        self.schedule: LRScheduler | None = None
        self._pending: dict[str, Any] | None = None
        self._top1: MaskedAccuracy | None = None
        self._loss_sum: Tensor | None = None
        self._steps = 0

    def begin_epoch(self, device: torch.device) -> None:
        """Reset the training metrics."""
        self._top1 = MaskedAccuracy().to(device) if isinstance(self.task, ClassTask) else None
        self._loss_sum, self._steps = torch.zeros((), device=device), 0

    def epoch_values(self) -> dict[str, Tensor]:
        """Return the training metrics of the epoch by name, scalars; empty without a step."""
        if self._loss_sum is None or self._steps == 0:
            return {}
        values = {} if self._top1 is None else {"train_top1": self._top1.compute()}
        return values | {"train_loss": self._loss_sum / self._steps}

    def learn(self, step: Step) -> None:
        """Make one optimizer step."""
        head, optimizer = self._built(step.features)
        outputs, loss = head.gradient(step.features, step.labels, step.valid, step.finite)
        optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self._top1 is not None:
            self._top1.update(outputs.argmax(dim=1) == step.labels, step.valid)
        if self._loss_sum is not None:
            self._loss_sum += loss
            self._steps += 1

    def predict(self, features: Tensor) -> Tensor | None:
        """Return the logits or numbers ``(B, C)`` of features ``(B, F)``, or None before the first step."""
        if self.head is None and self._pending is None:
            return None
        head, _ = self._built(features)
        return head(features)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the model, its optimizer and its schedule, on the CPU."""
        if self.head is None or self.optimizer is None:
            return self._pending or {}
        state: dict[str, Any] = {
            "head": self.head.state_dict(),
            "batches": self.head.batches,
            "optimizer": self.optimizer.state_dict(),
        }
        if self.schedule is not None:
            state["schedule"] = self.schedule.state_dict()
        return to_cpu(state)  # sharded checkpoints are loaded without a map_location

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Store a state until the first features determine the device and the width of the model."""
        if state:
            self._pending, self.head, self.optimizer, self.schedule = state, None, None, None

    def _built(self, features: Tensor) -> tuple[LinearHead, Optimizer]:
        """Return the model and its optimizer, created on first use."""
        width = features.shape[1]
        if self.head is None or self.optimizer is None or self.head.width != width:
            with torch.inference_mode(False), torch.no_grad():  # parameters created in inference mode cannot learn
                self.head = LinearHead(width, self.task.outputs, features.device, self.task)
                with torch.enable_grad():
                    self.optimizer = self._optimizer(self.head, self._global_batch(features))
                    self.schedule = None if self._make_schedule is None else self._make_schedule(self.optimizer)
                if self._pending is not None:
                    self._restore(self.head, self.optimizer, self._pending)
                    self._pending = None
        return self.head, self.optimizer

    def _global_batch(self, features: Tensor) -> int:
        """Return the number of images of the first step on all ranks, which may hold different numbers of them."""
        is_restored = self._pending is not None  # the rate is restored too; at validation some ranks may be absent
        return len(features) if is_restored else max(1, sum(batch_sizes(len(features), features.device)))

    def _optimizer(self, head: LinearHead, batch: int) -> Optimizer:
        if self._make_optimizer is None:
            lr = min(default_lr(batch, head.width), self.task.highest_lr(head.width)) if self.lr is None else self.lr
            nesterov = self.task.nesterov
            return torch.optim.SGD(head.parameters(), lr=lr, momentum=SGD_MOMENTUM, nesterov=nesterov, foreach=True)
        made = self._make_optimizer(list(head.parameters()))
        if not isinstance(made, Optimizer):
            hint = "Give for example `lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)`"
            fail("optimizer", "return an optimizer", type(made).__name__, hint, TypeError)
        return made

    def _restore(self, head: LinearHead, optimizer: Optimizer, state: dict[str, Any]) -> None:
        saved, own = tuple(state["head"]["weight"].shape), tuple(head.weight.shape)
        hint = "Use the `features` and `num_classes` of the checkpoint, or another `name` to start from zero"
        require(saved == own, self.owner, f"have a classifier of shape {saved}, as the checkpoint has", own, hint)
        missing = head.state_dict().keys() ^ state["head"].keys()
        hint = "Use the `task` and `class_weights` of the checkpoint, or another `name` to start from zero"
        require(not missing, self.owner, "have the statistics that the checkpoint has", sorted(missing), hint)
        head.load_state_dict(state["head"])
        head.batches = state["batches"]
        optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None and "schedule" in state:
            self.schedule.load_state_dict(state["schedule"])
