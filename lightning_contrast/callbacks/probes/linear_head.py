"""The linear model of the online probe: weights, running statistics and optimizer step, equal on every rank."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast.callbacks.probes.tasks import ClassTask, Task
from lightning_contrast.distributed import all_reduce_sum

STATISTICS_MOMENTUM = 0.02
"""Share of a batch in the running statistics after 1 / 0.02 = 50 batches; before, all batches weigh the same."""

CLIP = 10.0
"""Bound of the standardized features, so that a sudden change of the backbone cannot destroy the classifier."""

PENALTY = 10.0
"""L2 penalty of the model that is fitted to a bank: the inverse of ``c=0.1`` of `evaluation.linear_top1`."""

FIT_STEPS = 100
"""L-BFGS iterations of that fit at most."""


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
        self.loss_weight = torch.zeros((), device=device)
        """Weight of the last step in a mean over steps, over all ranks: the number of its images with a target."""

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

    def fit(self, features: Tensor, targets: Tensor, penalty: float = PENALTY) -> None:
        """Fit the model to all features at once, from zero: statistics, then weights by L-BFGS.

        The result is a function of the features and targets alone. For classes it is the multinomial logistic
        regression of `evaluation.linear_top1`; for regression it is ridge regression.

        Args:
            features: ``(N, F)``, finite.
            targets: Targets of the task, ``(N, ...)``, all known.
            penalty: Factor of half the squared norm of the weights, added to the loss summed over the images.
        """
        # In float64, the order of the rows, which depends on the number of ranks, does not show in the result. Many
        # accelerators are slow there.
        dtype = torch.float64 if features.device.type == "cpu" else torch.float32
        with torch.inference_mode(False), torch.autocast(features.device.type, enabled=False), torch.no_grad():
            features, targets = features.detach().to(dtype, copy=True), targets.detach().clone()
            var, mean = torch.var_mean(features, dim=0, correction=0)
            self.var.copy_(var)
            self.mean.copy_(mean)
            standardized = ((features - mean) * _bounded_variance(mean, var).rsqrt()).clamp(-CLIP, CLIP)
            if self.task.standardizes:
                target_var, target_mean = torch.var_mean(targets.to(dtype), dim=0, correction=0)
                self.target_var.copy_(target_var)
                self.target_mean.copy_(target_mean)
                scale = _bounded_variance(target_mean, target_var).rsqrt()
                targets = ((targets - target_mean) * scale).clamp(-CLIP, CLIP)
            if self.task.balances:
                self.class_counts.copy_(torch.bincount(targets, minlength=self.task.outputs))
            valid, weights = torch.ones(len(targets), dtype=torch.bool, device=targets.device), self._class_weights()
            weights = None if weights is None else weights.to(dtype)
            weight, bias = (torch.zeros_like(part, dtype=dtype, requires_grad=True) for part in self.parameters())
            optimizer = torch.optim.LBFGS([weight, bias], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

            def objective() -> Tensor:
                loss, _ = self.task.loss(F.linear(standardized, weight, bias), targets, valid, weights)
                loss = (loss + 0.5 * penalty * weight.square().sum()) / len(targets)
                weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
                return loss.detach()

            with torch.enable_grad():
                optimizer.step(objective)  # type: ignore[no-untyped-call]  # LBFGS has no annotations
            self.weight.copy_(weight)
            self.bias.copy_(bias)

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
        self.loss_weight = weight
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
