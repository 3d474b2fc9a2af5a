"""Training of the linear model of one layer: optimizer steps during the run, a fit at validation, saved state."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_contrast._checks import fail, require
from lightning_contrast.callbacks.probes.bank import Step
from lightning_contrast.callbacks.probes.linear_head import LinearHead, default_lr
from lightning_contrast.callbacks.probes.metrics import MaskedAccuracy
from lightning_contrast.callbacks.probes.tasks import ClassTask, Task
from lightning_contrast.distributed import batch_sizes

SGD_MOMENTUM = 0.9

MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Creates the optimizer of the given parameters."""

MakeSchedule: TypeAlias = Callable[[Optimizer], LRScheduler]
"""Creates the learning rate schedule of an optimizer."""

T = TypeVar("T")


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
        self.fitted: LinearHead | None = None
        self._pending: dict[str, Any] | None = None
        self._pending_fit: dict[str, Any] | None = None
        self._top1: MaskedAccuracy | None = None
        self._losses: Tensor | None = None
        self._steps = 0

    def begin_epoch(self, device: torch.device) -> None:
        """Reset the training metrics."""
        self._top1 = MaskedAccuracy().to(device) if isinstance(self.task, ClassTask) else None
        self._losses, self._steps = torch.zeros(2, device=device), 0

    def epoch_values(self) -> dict[str, Tensor]:
        """Return the training metrics of the epoch by name, scalars; empty without a step.

        The loss is the mean over the images with a target: a batch without one does not count.
        """
        if self._losses is None or self._steps == 0:
            return {}
        values = {} if self._top1 is None else {"train_top1": self._top1.compute()}
        return values | {"train_loss": self._losses[0] / self._losses[1]}

    def learn(self, step: Step) -> None:
        """Make one optimizer step."""
        head, optimizer = self._built(step.features)
        outputs, loss = head.gradient(step.features, step.labels, step.valid, step.finite)
        optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self._top1 is not None:
            self._top1.update(outputs.argmax(dim=1) == step.labels, step.valid)
        if self._losses is not None:
            weight = head.loss_weight.view(1)
            self._losses += torch.cat([loss.view(1) * weight, weight])
            self._steps += 1

    def fit(self, features: Tensor, targets: Tensor) -> None:
        """Fit a model of its own to a bank; the model that is trained in the steps does not change.

        Args:
            features: ``(N, F)``.
            targets: Targets of the task, ``(N, ...)``.
        """
        with torch.inference_mode(False), torch.no_grad():
            self.fitted = LinearHead(features.shape[1], self.task.outputs, features.device, self.task)
        self._pending_fit = None
        self.fitted.fit(features, targets)

    def predict(self, features: Tensor, *, fitted: bool = False) -> Tensor | None:
        """Return the logits or numbers ``(B, C)`` of features ``(B, F)``, or None before the first step.

        Args:
            features: ``(B, F)``.
            fitted: Use the model of the last `fit`, if there was one.
        """
        if fitted and self._pending_fit is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.fitted = LinearHead(features.shape[1], self.task.outputs, features.device, self.task)
                self._load(self.fitted, self._pending_fit)
            self._pending_fit = None
        if fitted and self.fitted is not None:
            hint = "Name a layer that `forward` and the validation step both call"
            widths = (features.shape[1], self.fitted.width)
            require(widths[0] == widths[1], "features", "be as wide at validation as in the bank", widths, hint)
            return self.fitted(features)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
        if self.head is None and self._pending is None:
            return None
        head, _ = self._built(features)
        return head(features)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the models, the optimizer and its schedule, on the CPU."""
        state: dict[str, Any] = dict(self._pending or {})
        if self.head is not None and self.optimizer is not None:
            state = {
                "head": self.head.state_dict(),
                "batches": self.head.batches,
                "optimizer": self.optimizer.state_dict(),
            }
            if self.schedule is not None:
                state["schedule"] = self.schedule.state_dict()
        fitted = self._pending_fit if self.fitted is None else self.fitted.state_dict()
        if fitted is not None:
            state["fitted"] = fitted
        return to_cpu(state)  # sharded checkpoints are loaded without a map_location

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Store a state until the first features determine the device and the width of the model."""
        state = dict(state)
        fitted = state.pop("fitted", None)
        if fitted is not None:
            self._pending_fit, self.fitted = fitted, None
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
        self._load(head, state["head"])
        head.batches = state["batches"]
        optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None and "schedule" in state:
            self.schedule.load_state_dict(state["schedule"])

    def _load(self, head: LinearHead, state: dict[str, Any]) -> None:
        saved, own = tuple(state["weight"].shape), tuple(head.weight.shape)
        hint = "Use the `features` and `num_classes` of the checkpoint, or another `name` to start from zero"
        require(saved == own, self.owner, f"have a classifier of shape {saved}, as the checkpoint has", own, hint)
        missing = head.state_dict().keys() ^ state.keys()
        hint = "Use the `task` and `class_weights` of the checkpoint, or another `name` to start from zero"
        require(not missing, self.owner, "have the statistics that the checkpoint has", sorted(missing), hint)
        head.load_state_dict(state)
