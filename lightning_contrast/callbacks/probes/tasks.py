"""Tasks of an online probe: classification, multi-label classification, regression."""

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.callbacks.capture.labels import class_targets
from lightning_contrast.callbacks.probes.metrics import (
    ClassScores,
    MeanLoss,
    MultilabelScores,
    RegressionScores,
    Scores,
)


class TaskScores(Scores):
    """Metrics of a task, and the mean validation loss as ``loss``, without class weights and in the unit of targets.

    Args:
        task: The task.
        device: Device of the outputs.
    """

    def __init__(self, task: "Task", device: torch.device) -> None:
        self.task, self.scores, self.loss = task, task.scores(device), MeanLoss().to(device)

    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add outputs ``(B, C)``, targets ``(B, ...)`` and the mask ``(B,)``."""
        self.scores.update(outputs, targets, valid)
        self.loss.update(*self.task.loss(outputs.float(), self.task.masked(targets, valid), valid, None))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the task and ``loss``, scalars."""
        return self.scores.compute() | {"loss": self.loss.compute() * self.task.logged_factor()}


IGNORED = -1
"""Label of an image without a label."""

TaskName: TypeAlias = Literal["classes", "multilabel", "regression"]
ClassWeights: TypeAlias = Literal["balanced"] | Tensor | None
TASKS = ("classes", "multilabel", "regression")


class Task(ABC):
    """Targets, metrics and loss of a probe.

    Args:
        outputs: Number of outputs C: classes, labels or numbers.
    """

    standardizes = False
    """Whether targets are standardized by running statistics, as the features are."""
    balances = False
    """Whether the loss weights classes by their inverse frequency."""
    rows = False
    """Whether integers (B, C) in the second place of a batch are labels, and not the tokens of texts."""
    nesterov = False
    """Whether SGD uses Nesterov momentum. Without it a squared error, whose slope is unbounded, oscillates."""

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs

    @abstractmethod
    def targets(self, found: Any) -> Tensor:
        """Convert the labels of a batch to the targets of the loss.

        Args:
            found: Labels as the batch holds them.

        Returns:
            Targets, ``(B, ...)``.

        Raises:
            TypeError: If the labels are not a tensor of the right kind.
            ValueError: If their shape is wrong.
        """

    @abstractmethod
    def check(self, targets: Tensor) -> None:
        """Check the values of targets ``(B, ...)``; synchronizes with the device.

        Raises:
            ValueError: If a value is out of range.
        """

    @abstractmethod
    def has_target(self, targets: Tensor) -> Tensor:
        """Return which images have a target, ``(B,)``, bool, for targets ``(B, ...)``."""

    @abstractmethod
    def masked(self, targets: Tensor, valid: Tensor) -> Tensor:
        """Return the targets ``(B, ...)`` with a neutral value in the rows that ``valid``, ``(B,)``, excludes."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the summed loss of the valid images and the weight of each image in its mean.

        Args:
            outputs: ``(B, C)``.
            targets: What `masked` returns, ``(B, ...)``; standardized for a task that standardizes.
            valid: ``(B,)``, bool.
            weights: Class weights, ``(C,)``, or None.

        Returns:
            The sum over the images, a scalar, and the weights ``(B,)`` whose sum divides it.
        """

    def logged_factor(self) -> float:
        """Return the factor of the loss in the logs."""
        return 1.0

    def highest_lr(self, width: int) -> float:
        """Return the learning rate above which SGD with momentum may diverge on ``width`` standardized features."""
        return float("inf")

    @abstractmethod
    def scores(self, device: torch.device) -> Scores:
        """Return new validation metrics on a device."""


class ClassTask(Task):
    """One class out of C per image; softmax cross-entropy.

    Args:
        outputs: Number of classes C, >= 2.
        class_weights: "balanced", weights ``(C,)``, or None.

    Raises:
        TypeError: If ``class_weights`` is neither a str, a tensor nor None.
        ValueError: If there are fewer than 2 classes, or the weights have the wrong shape or negative values.
    """

    def __init__(self, outputs: int, class_weights: ClassWeights = None) -> None:
        super().__init__(outputs)
        check_at_least("num_classes", outputs, 2)
        self.balances = isinstance(class_weights, str)
        self.weights = _checked_weights(class_weights, outputs)

    def targets(self, found: Any) -> Tensor:
        """Return classes ``(B,)``, int64."""
        return class_targets(found)

    def check(self, targets: Tensor) -> None:
        """Check that classes ``(B,)`` lie in -1..C - 1."""
        if len(targets) == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(targets))
        rule = f"lie in 0..{self.outputs - 1}, or be {IGNORED} for images without a label"
        fits = low >= IGNORED and high < self.outputs
        require(fits, "labels", rule, low if low < IGNORED else high, "Set `num_classes` to the number of classes")

    def has_target(self, targets: Tensor) -> Tensor:
        """Return which classes ``(B,)`` are one of the C, ``(B,)``, bool."""
        return targets == targets.clamp(0, self.outputs - 1)

    def masked(self, targets: Tensor, valid: Tensor) -> Tensor:
        """Return the classes ``(B,)`` with -1 in the rows that ``valid``, ``(B,)``, excludes."""
        return targets.masked_fill(~valid, IGNORED)

    def loss(self, outputs: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of the weighted cross-entropies in nats, a scalar, and the weights of the images ``(B,)``."""
        loss = F.cross_entropy(outputs, targets, weights, ignore_index=IGNORED, reduction="sum")
        return loss, valid.to(outputs.dtype) if weights is None else weights[targets] * valid

    def scores(self, device: torch.device) -> Scores:
        """Return top-1 and top-5 accuracy and the calibration error."""
        return ClassScores(self.outputs, device)


class MultilabelTask(Task):
    """Any of C labels per image, each 0 or 1, or -1 where unknown; one logistic regression per label.

    Args:
        outputs: Number of labels C.
    """

    rows = True

    def targets(self, found: Any) -> Tensor:
        """Return labels ``(B, C)``, int64."""
        hint = f"Give {self.outputs} numbers 0 or 1 per image"
        found = _tensor(found, hint)
        fits = found.shape[1:] == (self.outputs,)
        require(fits, "labels", f"have the shape (B, {self.outputs})", tuple(found.shape), hint)
        return found.long() if found.dtype == torch.bool or not found.is_floating_point() else _whole(found)

    def check(self, targets: Tensor) -> None:
        """Check that labels ``(B, C)`` are 0, 1 or -1."""
        if targets.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(targets))
        fits = low >= IGNORED and high <= 1
        rule = f"be 0 or 1, or {IGNORED} where unknown"
        require(fits, "labels", rule, low if low < IGNORED else high, "Give one number per label")

    def has_target(self, targets: Tensor) -> Tensor:
        """Return which images have a known label, ``(B,)``, bool."""
        return (targets >= 0).any(dim=1)

    def masked(self, targets: Tensor, valid: Tensor) -> Tensor:
        """Return the labels ``(B, C)`` with -1 in the rows that ``valid``, ``(B,)``, excludes."""
        return targets.masked_fill(~valid.unsqueeze(1), IGNORED)

    def loss(self, outputs: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the summed binary cross-entropies of known labels, a scalar, and their share per image, ``(B,)``."""
        known = ((targets >= 0) & valid.unsqueeze(1)).to(outputs.dtype)
        losses = F.binary_cross_entropy_with_logits(outputs, targets.clamp(min=0).to(outputs.dtype), reduction="none")
        return (losses * known).sum(), known.mean(dim=1)

    def logged_factor(self) -> float:
        """Return 1 / C: the mean over the labels is logged."""
        return 1 / self.outputs

    def scores(self, device: torch.device) -> Scores:
        """Return mAP and F1, averaged over the labels."""
        return MultilabelScores(self.outputs, device)


class RegressionTask(Task):
    """C numbers per image, NaN where unknown; squared error on standardized targets.

    Args:
        outputs: Number of targets C.
    """

    standardizes = nesterov = True

    def targets(self, found: Any) -> Tensor:
        """Return numbers ``(B, C)``, float32."""
        hint = f"Give {self.outputs} numbers per image"
        given = _tensor(found, hint)
        if given.dtype == torch.bool or given.is_complex():
            fail("labels", "be a tensor of numbers", str(given.dtype), hint, TypeError)
        numbers = given.float().unsqueeze(1) if given.ndim == 1 else given.float()
        fits = numbers.ndim == 2 and numbers.shape[1] == self.outputs
        require(fits, "labels", f"have the shape (B, {self.outputs})", tuple(numbers.shape), hint)
        return numbers

    def check(self, targets: Tensor) -> None:
        """Check that targets ``(B, C)`` are finite, or NaN where unknown."""
        infinite = bool(torch.isinf(targets).any())
        require(not infinite, "labels", "be finite, or NaN where unknown", "infinity", "Check the targets")

    def has_target(self, targets: Tensor) -> Tensor:
        """Return which images have only known targets, ``(B,)``, bool."""
        return torch.isfinite(targets).all(dim=1)

    def masked(self, targets: Tensor, valid: Tensor) -> Tensor:
        """Return the targets ``(B, C)`` with 0 in the rows that ``valid``, ``(B,)``, excludes."""
        return targets.masked_fill(~valid.unsqueeze(1), 0.0)

    def loss(self, outputs: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return half the sum of the squared errors, a scalar, and 1 per valid image, ``(B,)``."""
        return 0.5 * ((outputs - targets).square() * valid.unsqueeze(1)).sum(), valid.to(outputs.dtype)

    def logged_factor(self) -> float:
        """Return 2 / C: the mean squared error over the variance of the targets is logged."""
        return 2 / self.outputs

    def highest_lr(self, width: int) -> float:
        """Return 1 / F: half the squared error has a curvature of at most F, and SGD diverges above 1.36 / F."""
        return 1 / width

    def scores(self, device: torch.device) -> Scores:
        """Return R2 and the mean absolute error."""
        return RegressionScores(device)


def build_task(name: str, outputs: int, class_weights: ClassWeights) -> Task:
    """Create a task by name.

    Args:
        name: One of `TASKS`.
        outputs: Number of classes, labels or numbers.
        class_weights: For "classes" only.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the name is unknown, or an argument does not fit the task.
    """
    check_choice("task", name, TASKS)
    if name == "classes":
        return ClassTask(outputs, class_weights)
    hint = 'Leave it out, or set `task="classes"`'
    require(class_weights is None, "class_weights", f"be None for the task {name!r}", class_weights, hint)
    check_at_least("num_classes", outputs, 1)
    return MultilabelTask(outputs) if name == "multilabel" else RegressionTask(outputs)


def _tensor(found: Any, hint: str) -> Tensor:
    if not isinstance(found, Tensor):
        fail("labels", "be a tensor", type(found).__name__, hint, TypeError)
    return found


def _whole(found: Tensor) -> Tensor:
    """Convert float labels to integers; fractions become 2, which `MultilabelTask.check` refuses."""
    return torch.where(found == found.round(), found, 2.0).long()


def _checked_weights(weights: ClassWeights, outputs: int) -> Tensor | None:
    if isinstance(weights, str):
        check_choice("class_weights", weights, ("balanced",))
        return None
    if weights is None:
        return None
    hint = f'Give {outputs} positive numbers, or "balanced"'
    if not isinstance(weights, Tensor):
        fail("class_weights", 'be "balanced", a tensor or None', type(weights).__name__, hint, TypeError)
    weights = weights.detach().to(torch.float32, copy=True)
    require(weights.shape == (outputs,), "class_weights", f"have the shape ({outputs},)", tuple(weights.shape), hint)
    fits = bool((weights >= 0).all() and weights.isfinite().all() and weights.sum() > 0)
    require(fits, "class_weights", "be finite and >= 0, some above 0", weights.tolist(), hint)
    return weights
