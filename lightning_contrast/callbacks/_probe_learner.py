"""One linear model of the online probe with its optimizer, its schedule and what it logs of training."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from lightning_contrast._checks import fail, require
from lightning_contrast.callbacks._probe_base import Step
from lightning_contrast.callbacks._probe_head import LinearHead, default_lr, to_cpu
from lightning_contrast.callbacks._probe_share import Share
from lightning_contrast.callbacks._probe_task import ClassTask, Task
from lightning_contrast.distributed import batch_sizes

SGD_MOMENTUM = 0.9

MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeSchedule: TypeAlias = Callable[[Optimizer], LRScheduler]


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
            mend = "Give for example `lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)`"
            fail("optimizer", "return an optimizer", type(made).__name__, mend, TypeError)
        return made

    def _restore(self, head: LinearHead, optimizer: Optimizer, state: dict[str, Any]) -> None:
        saved, own = tuple(state["head"]["weight"].shape), tuple(head.weight.shape)
        mend = "Give the probe the `features` and `num_classes` that it had, or another `name` to begin anew"
        require(saved == own, self.owner, f"have a classifier of shape {saved}, as the checkpoint has", own, mend)
        missing = head.state_dict().keys() ^ state["head"].keys()
        mend = "Give the probe the `task` and `class_weights` that it had, or another `name` to begin anew"
        require(not missing, self.owner, "have the statistics that the checkpoint has", sorted(missing), mend)
        head.load_state_dict(state["head"])
        head.batches = state["batches"]
        optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None and "schedule" in state:
            self.schedule.load_state_dict(state["schedule"])
