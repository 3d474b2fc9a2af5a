"""What an online probe may learn: classes, several labels at once, or numbers."""

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.callbacks.capture.labels import class_targets
from lightning_contrast.callbacks.probes.metrics import ClassScores, MultilabelScores, RegressionScores, Scores

IGNORED = -1
"""The label of an image that has none."""

TaskName: TypeAlias = Literal["classes", "multilabel", "regression"]
ClassWeights: TypeAlias = Literal["balanced"] | Tensor | None
TASKS = ("classes", "multilabel", "regression")


class Task(ABC):
    """What the targets of a probe are, how its outputs are judged, and what it loses.

    Args:
        outputs: Number of outputs C: classes, labels or numbers.
    """

    standardises = False
    """Targets are standardised by running statistics, as the features are."""
    balances = False
    """Classes weigh what makes them count alike."""
    nesterov = False
    """Nesterov's momentum: without it a squared error, whose slope has no bound, swings around its minimum."""

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs

    @abstractmethod
    def targets(self, found: Any) -> Tensor:
        """Return labels as they were found in a batch in the shape and type that the loss takes, or name the fault."""

    @abstractmethod
    def check(self, targets: Tensor) -> None:
        """Raise a ValueError where a value is out of range; reads values on the host."""

    @abstractmethod
    def has_target(self, targets: Tensor) -> Tensor:
        """Return whether an image has a target, (B,), bool."""

    def masked(self, targets: Tensor, valid: Tensor) -> Tensor:
        """Return the targets with 0 in the rows that do not count."""
        return targets.masked_fill(~valid.view(-1, *[1] * (targets.ndim - 1)), 0)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of the loss over the valid images, and the weight by which it is to be divided.

        Args:
            outputs: (B, C).
            targets: As `targets` returns them.
            valid: (B,), bool.
            weights: Weights of the classes, (C,), or None.
        """

    def logged_share(self) -> float:
        """Return what the loss is multiplied by before it is logged."""
        return 1.0

    def highest_lr(self, width: int) -> float:
        """Return the learning rate beyond which SGD with momentum may diverge on F standardised features."""
        return float("inf")

    @abstractmethod
    def scores(self, device: torch.device) -> Scores:
        """Return what judges outputs at validation."""


class ClassTask(Task):
    """One class out of C for each image; softmax cross-entropy.

    Args:
        outputs: Number of classes C.
        class_weights: "balanced", weights (C,), or None.
    """

    def __init__(self, outputs: int, class_weights: ClassWeights = None) -> None:
        super().__init__(outputs)
        check_at_least("num_classes", outputs, 2)
        self.balances = isinstance(class_weights, str)
        self.weights = _checked_weights(class_weights, outputs)

    def targets(self, found: Any) -> Tensor:
        """Return classes (B,), int64."""
        return class_targets(found)

    def check(self, targets: Tensor) -> None:
        """Check that labels lie in -1..C - 1."""
        if len(targets) == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(targets))
        rule = f"lie in 0..{self.outputs - 1}, or be {IGNORED} for images without a label"
        fits = low >= IGNORED and high < self.outputs
        require(fits, "labels", rule, low if low < IGNORED else high, "Set `num_classes` to the number of classes")

    def has_target(self, targets: Tensor) -> Tensor:
        """Return whether the class is one of the C."""
        return (targets >= 0) & (targets < self.outputs)

    def loss(self, outputs: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of the weighted cross-entropies in nats, and the sum of the weights."""
        share = valid.to(outputs.dtype) if weights is None else weights[targets] * valid
        return (F.cross_entropy(outputs, targets, reduction="none") * share).sum(), share.sum()

    def scores(self, device: torch.device) -> Scores:
        """Return top-1, top-5 and the calibration error."""
        return ClassScores(self.outputs, device)


class MultilabelTask(Task):
    """Any of C labels for each image, each 0 or 1, or -1 where it is not known; a logistic regression for each."""

    def targets(self, found: Any) -> Tensor:
        """Return labels (B, C), int64."""
        hint = f"Give {self.outputs} numbers 0 or 1 for each image"
        found = _tensor(found, hint)
        fits = found.shape[1:] == (self.outputs,)
        require(fits, "labels", f"have the shape (B, {self.outputs})", tuple(found.shape), hint)
        return found.long() if found.dtype == torch.bool or not found.is_floating_point() else _whole(found)

    def check(self, targets: Tensor) -> None:
        """Check that labels are 0, 1 or -1."""
        if targets.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(targets))
        fits = low >= IGNORED and high <= 1
        rule = f"be 0 or 1, or {IGNORED} where it is not known"
        require(fits, "labels", rule, low if low < IGNORED else high, "Give one number for each label")

    def has_target(self, targets: Tensor) -> Tensor:
        """Return whether any of the labels is known."""
        return (targets >= 0).any(dim=1)

    def masked(self, targets: Tensor, valid: Tensor) -> Tensor:
        """Return the targets with -1 in the rows that do not count."""
        return targets.masked_fill(~valid.unsqueeze(1), IGNORED)

    def loss(self, outputs: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of the binary cross-entropies of the known labels, and how many rows they would fill."""
        known = ((targets >= 0) & valid.unsqueeze(1)).to(outputs.dtype)
        losses = F.binary_cross_entropy_with_logits(outputs, targets.clamp(min=0).to(outputs.dtype), reduction="none")
        return (losses * known).sum(), known.sum() / self.outputs

    def logged_share(self) -> float:
        """Return 1 / C: what is logged is the mean over the labels."""
        return 1 / self.outputs

    def scores(self, device: torch.device) -> Scores:
        """Return mAP and F1, means over the labels."""
        return MultilabelScores(self.outputs, device)


class RegressionTask(Task):
    """C numbers for each image, NaN where they are not known; squared error on standardised targets."""

    standardises = nesterov = True

    def targets(self, found: Any) -> Tensor:
        """Return numbers (B, C), float32."""
        hint = f"Give {self.outputs} numbers for each image"
        given = _tensor(found, hint)
        if given.dtype == torch.bool or given.is_complex():
            fail("labels", "be a tensor of numbers", str(given.dtype), hint, TypeError)
        numbers = given.float().unsqueeze(1) if given.ndim == 1 else given.float()
        fits = numbers.ndim == 2 and numbers.shape[1] == self.outputs
        require(fits, "labels", f"have the shape (B, {self.outputs})", tuple(numbers.shape), hint)
        return numbers

    def check(self, targets: Tensor) -> None:
        """Refuse infinite targets; NaN is a target that is not known."""
        infinite = bool(torch.isinf(targets).any())
        require(not infinite, "labels", "be finite, or NaN where they are not known", "infinity", "Look at the targets")

    def has_target(self, targets: Tensor) -> Tensor:
        """Return whether all targets are known."""
        return torch.isfinite(targets).all(dim=1)

    def loss(self, outputs: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return half the sum of the squared errors, and the number of images."""
        return 0.5 * ((outputs - targets).square() * valid.unsqueeze(1)).sum(), valid.to(outputs.dtype).sum()

    def logged_share(self) -> float:
        """Return 2 / C: what is logged is the mean squared error over the variance of the targets."""
        return 2 / self.outputs

    def highest_lr(self, width: int) -> float:
        """Return 1 / F: the curvature of half the squared error is F at most, and 1.36 over it is the limit."""
        return 1 / width

    def scores(self, device: torch.device) -> Scores:
        """Return R2 and the mean absolute error."""
        return RegressionScores(device)


def build_task(name: str, outputs: int, class_weights: ClassWeights) -> Task:
    """Return the task of that name.

    Args:
        name: One of `TASKS`.
        outputs: Number of classes, labels or numbers.
        class_weights: For "classes" only.

    Raises:
        ValueError: If there is no such task, or an argument does not fit it.
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
    """Return float labels as integers; 2, which `check` refuses, for what is no whole number."""
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
