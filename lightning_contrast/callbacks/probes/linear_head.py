"""The linear model of the online probe: its weights, its statistics and its step, the same on every rank."""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from lightning_contrast._checks import fail, require
from lightning_contrast.callbacks.probes.base import Step
from lightning_contrast.callbacks.probes.metrics import Share
from lightning_contrast.callbacks.probes.tasks import ClassTask, Task
from lightning_contrast.distributed import all_reduce_sum, batch_sizes

SGD_MOMENTUM = 0.9

MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]

MakeSchedule: TypeAlias = Callable[[Optimizer], LRScheduler]


STATISTICS_MOMENTUM = 0.02
"""Share of a batch in the running statistics, once more than 1 / 0.02 = 50 batches were seen."""
CLIP = 10.0
"""Standardised features are cut there, so that a jump of the backbone cannot throw the classifier away."""


T = TypeVar("T")


class LinearHead(nn.Module):
    """A linear model on features that are standardised by running statistics; all in float32, autocast or not.

    It starts at zero: the usual start of a convex problem, and one that draws no random number.

    Args:
        width: F.
        num_outputs: C: classes, labels or targets.
        device: Where the features are.
        task: What it learns; None is one of C classes.
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
        if self.task.standardises:
            self.register_buffer("target_mean", torch.zeros(num_outputs, **options))
            self.register_buffer("target_var", torch.ones(num_outputs, **options))
            self.register_buffer("target_batches", torch.zeros(1, **options))  # those with targets, not all have some
        if self.task.balances:
            self.register_buffer("class_counts", torch.zeros(num_outputs, **options))
        given = getattr(self.task, "weights", None)
        self._weights: Tensor | None = None if given is None else given.to(device)
        self.batches = 0

    @property
    def width(self) -> int:
        """The number of features, F."""
        return self.weight.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits, or the predicted numbers, (B, C) of features (B, F)."""
        with torch.autocast(features.device.type, enabled=False):
            outputs = self._linear((features.float() - self.mean) * _scale(self.mean, self.var))
            if self.task.standardises:
                outputs = outputs / _scale(self.target_mean, self.target_var) + self.target_mean
            return outputs

    def gradient(self, features: Tensor, targets: Tensor, valid: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Set ``.grad`` to the gradient of the mean loss over the valid images of all ranks, and follow the features.

        One all-reduce carries the gradients, the loss and the sums for the statistics, which move afterwards: a step
        sees the statistics of the steps before it, which are equal on all ranks.

        Args:
            features: (B, F), float32, finite.
            targets: What the task takes, (B, ...).
            valid: (B,), False where an image does not count.
            finite: (B,), False where the features are not the image's own and do not count in the statistics.

        Returns:
            The outputs (B, C) and the mean loss over all ranks; both detached.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self._gradient(features.float(), targets, valid, finite)

    def _gradient(self, features: Tensor, targets: Tensor, valid: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        counts, counted = finite.to(features.dtype), valid.to(features.dtype)
        if self.batches == 0:
            _start(self.mean, self.var, features, counts)
            if self.task.standardises:
                _start(self.target_mean, self.target_var, targets, counted)
        scale = _scale(self.mean, self.var)
        standardised = (features - self.mean) * scale
        if self.task.standardises:
            target_scale = _scale(self.target_mean, self.target_var)
            targets = ((targets - self.target_mean) * target_scale).clamp(-CLIP, CLIP)
        with torch.enable_grad():
            outputs = self._linear(standardised)
            loss, weight = self.task.loss(outputs, targets, valid, self._class_weights())
            grads = torch.autograd.grad(loss, (self.weight, self.bias))
        sums = [*grads, loss.detach(), weight, *_moments(standardised, counts)]
        if self.task.standardises:
            sums += _moments(targets, counted)
        if self.task.balances:
            classes = torch.arange(len(self.bias), device=targets.device)
            sums.append(((targets.unsqueeze(1) == classes) * counted.unsqueeze(1)).sum(dim=0))
        flat = all_reduce_sum(torch.cat([part.reshape(-1) for part in sums]))
        grad, bias, loss, weight, *rest = torch.split(flat, [part.numel() for part in sums])
        weight = torch.where(weight > 0, weight, 1.0)
        self.weight.grad, self.bias.grad = grad.view_as(self.weight) / weight, bias / weight
        self.batches += 1
        share = max(1 / self.batches, STATISTICS_MOMENTUM)
        _follow(self.mean, self.var, rest[:3], scale, share)
        if self.task.standardises:
            self.target_batches.add_(rest[3] > 0)
            share_of_targets = self.target_batches.clamp(min=1.0).reciprocal().clamp(min=STATISTICS_MOMENTUM)
            _follow(self.target_mean, self.target_var, rest[3:6], target_scale, share_of_targets)
        if self.task.balances:
            self.class_counts.add_(rest[-1])
        return outputs.detach(), (loss / weight).squeeze(0) * self.task.logged_share()

    def _linear(self, standardised: Tensor) -> Tensor:
        return F.linear(standardised.clamp(-CLIP, CLIP), self.weight, self.bias)

    def _class_weights(self) -> Tensor | None:
        """Return the weights of the classes (C,): given ones, or N / (C n) of the n images of a class seen so far."""
        if not self.task.balances:
            return self._weights
        total = self.class_counts.sum()
        return torch.where(total > 0, total / (len(self.bias) * self.class_counts.clamp(min=1.0)), 1.0)


def _scale(mean: Tensor, var: Tensor) -> Tensor:
    """Return 1 / std; constant features are worth nothing, not a division by their rounding errors."""
    floor = 1e-12 * var.mean() + 1e-10 * mean.square() + 1e-30
    return var.maximum(floor).rsqrt()


def _start(mean: Tensor, var: Tensor, values: Tensor, counts: Tensor) -> None:
    """Take the statistics of the first batch, in two passes, since nothing is known of their size yet."""
    counts = counts.unsqueeze(1)
    sums = all_reduce_sum(torch.cat([(values * counts).sum(dim=0), counts.sum().view(1)]))
    total = sums[-1].clamp(min=1.0)
    mean.copy_(sums[:-1] / total)
    squares = all_reduce_sum(((values - mean).square() * counts).sum(dim=0))
    var.copy_(torch.where(sums[-1] > 0, squares / total, 1.0))


def _moments(standardised: Tensor, counts: Tensor) -> list[Tensor]:
    """Return the number of rows that count, and the sums of what is in them and of its squares."""
    kept = standardised * counts.unsqueeze(1)
    return [counts.sum(), kept.sum(dim=0), (kept * standardised).sum(dim=0)]


def _follow(mean: Tensor, var: Tensor, moments: list[Tensor], scale: Tensor, share: float | Tensor) -> None:
    """Move the statistics by the mean and the mean square of a batch's standardised values."""
    seen = moments[0].clamp(min=1.0)
    first, second = moments[1] / seen, moments[2] / seen
    moved = share * (moments[0] > 0)
    shift = first / scale
    batch_var = (second - first.square()).clamp(min=0.0) / scale.square()
    var.add_(moved * (batch_var + (1 - moved) * shift.square() - var))
    mean.add_(moved * shift)


def default_lr(batch: int, width: int) -> float:
    """Return the learning rate of SGD with momentum 0.9 that needs no tuning.

    Args:
        batch: Images of a step on all ranks, B: more images, less noise, longer steps.
        width: F: the curvature of the loss grows with it.
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


class Learner:
    """Trains the model of one layer.

    Args:
        owner: Name of the probe and the layer, for messages.
        task: What is learned.
        lr: Learning rate of SGD; None chooses it by the batch and the width.
        optimizer: Gets the parameters and returns their optimizer; None is SGD with momentum 0.9.
        schedule: Gets the optimizer and returns its schedule, which moves at every step; None leaves the rate alone.
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
        self._top1: Share | None = None
        self._loss: MeanMetric | None = None

    def begin_epoch(self, device: torch.device) -> None:
        """Begin to count anew."""
        self._top1 = Share().to(device) if isinstance(self.task, ClassTask) else None
        self._loss = MeanMetric(nan_strategy="disable").to(device)

    def epoch_values(self) -> dict[str, Tensor]:
        """Return what the epoch's steps gave, by name; nothing where there was no step."""
        metrics = {"train_top1": self._top1, "train_loss": self._loss}
        return {key: m.compute() for key, m in metrics.items() if m is not None and m.update_called}

    def learn(self, step: Step) -> None:
        """Do one step of the optimizer."""
        head, optimizer = self._built(step.features)
        outputs, loss = head.gradient(step.features, step.labels, step.valid, step.finite)
        optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self._top1 is not None:
            self._top1.update(outputs.argmax(dim=1) == step.labels, step.valid)
        if self._loss is not None:
            self._loss.update(loss)

    def predict(self, features: Tensor) -> Tensor | None:
        """Return the logits or numbers (B, C) of features (B, F), or None before the first step."""
        if self.head is None and self._pending is None:
            return None
        head, _ = self._built(features)
        return head(features)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def state_dict(self) -> dict[str, Any]:
        """Return the model, its statistics, its optimizer and its schedule, on the CPU."""
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
        """Keep the state until the model is built: where and how wide the features are is not known yet."""
        if state:
            self._pending, self.head, self.optimizer, self.schedule = state, None, None, None

    def _built(self, features: Tensor) -> tuple[LinearHead, Optimizer]:
        """Return the model and its optimizer, built at their first use."""
        width = features.shape[1]
        if self.head is None or self.optimizer is None or self.head.width != width:
            with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode could never learn
                self.head = LinearHead(width, self.task.outputs, features.device, self.task)
                with torch.enable_grad():
                    self.optimizer = self._optimizer(self.head, self._global_batch(features))
                    self.schedule = None if self._make_schedule is None else self._make_schedule(self.optimizer)
                if self._pending is not None:
                    self._restore(self.head, self.optimizer, self._pending)
                    self._pending = None
        return self.head, self.optimizer

    def _global_batch(self, features: Tensor) -> int:
        """Return the images of the first step on all ranks, which may hold different numbers of them."""
        is_restored = self._pending is not None  # with its rate; at a validation not all ranks need to be here
        return len(features) if is_restored else max(1, sum(batch_sizes(len(features), features.device)))

    def _optimizer(self, head: LinearHead, batch: int) -> Optimizer:
        if self._make_optimizer is None:
            lr = min(default_lr(batch, head.width), self.task.highest_lr(head.width)) if self.lr is None else self.lr
            return torch.optim.SGD(head.parameters(), lr=lr, momentum=SGD_MOMENTUM, nesterov=self.task.nesterov)
        made = self._make_optimizer(list(head.parameters()))
        if not isinstance(made, Optimizer):
            hint = "Give for example `lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)`"
            fail("optimizer", "return an optimizer", type(made).__name__, hint, TypeError)
        return made

    def _restore(self, head: LinearHead, optimizer: Optimizer, state: dict[str, Any]) -> None:
        saved, own = tuple(state["head"]["weight"].shape), tuple(head.weight.shape)
        hint = "Give the probe the `features` and `num_classes` that it had, or another `name` to begin anew"
        require(saved == own, self.owner, f"have a classifier of shape {saved}, as the checkpoint has", own, hint)
        missing = head.state_dict().keys() ^ state["head"].keys()
        hint = "Give the probe the `task` and `class_weights` that it had, or another `name` to begin anew"
        require(not missing, self.owner, "have the statistics that the checkpoint has", sorted(missing), hint)
        head.load_state_dict(state["head"])
        head.batches = state["batches"]
        optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None and "schedule" in state:
            self.schedule.load_state_dict(state["schedule"])
