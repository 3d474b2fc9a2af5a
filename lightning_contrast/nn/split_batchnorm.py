"""BatchNorm with separate statistics per split of the batch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that normalizes ``splits`` equal parts of the batch separately, like that many devices.

    MoCo needs it (with shuffled keys) on one device: if queries and keys share statistics, the network can identify
    positives by them. Source: the CIFAR-10 demo of https://github.com/facebookresearch/moco. Sample ``i`` belongs to
    part ``i % splits``. In training the running statistics are updated with the mean over the parts; evaluation is that
    of ordinary BatchNorm. ``SyncBatchNorm.convert_sync_batchnorm`` replaces it, which removes the split.

    Args:
        num_features: Channels C.
        splits: Number of parts; the batch must be a multiple of it in training.
        eps: Added to the variance.
        momentum: Share of the new statistics in the running ones; None for the mean over all batches.
    """

    def __init__(self, num_features: int, splits: int, *, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        check_at_least("splits", splits, 1)
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        """Normalize maps ``(B, C, H, W)``.

        Raises:
            ValueError: If the batch is no multiple of ``splits`` in training.
        """
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        size, channels, height, width = input.shape
        if size % self.splits:
            raise ValueError(
                f"`splits` must divide the batch of {size}, got {self.splits}. Use drop_last=True and a `batch_size` "
                f"that is a multiple of `splits`."
            )
        # The parts become channels, so that one call normalizes each with separate statistics.
        parts = input.reshape(-1, self.splits * channels, height, width)
        means, variances = self.running_mean, self.running_var
        if means is not None and variances is not None:
            means, variances = means.repeat(self.splits), variances.repeat(self.splits)
        weight = None if self.weight is None else self.weight.repeat(self.splits)
        bias = None if self.bias is None else self.bias.repeat(self.splits)
        output = F.batch_norm(parts, means, variances, weight, bias, True, self._next_momentum(), self.eps)
        if (
            self.running_mean is not None
            and self.running_var is not None
            and means is not None
            and variances is not None
        ):
            with torch.no_grad():
                self.running_mean.copy_(means.view(self.splits, channels).mean(0))
                self.running_var.copy_(variances.view(self.splits, channels).mean(0))
        return output.view_as(input)

    def _next_momentum(self) -> float:
        """Count the batch and return the weight of its statistics in the running ones."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, splits={self.splits}"


def convert_split_batchnorm(module: nn.Module, splits: int) -> nn.Module:
    """Replace every ``BatchNorm2d`` of a network by `SplitBatchNorm2d`, with its parameters and buffers.

    timm's BatchNorm with a built-in activation becomes a sequence of both.

    Args:
        module: The network, changed in place.
        splits: Number of parts of the batch.

    Returns:
        The network, or the new layer if ``module`` itself is a ``BatchNorm2d``.
    """
    if isinstance(module, nn.BatchNorm2d):
        return _convert(module, splits)
    for name, child in list(module.named_children()):
        setattr(module, name, convert_split_batchnorm(child, splits))
    return module


def _convert(norm: nn.BatchNorm2d, splits: int) -> nn.Module:
    split = SplitBatchNorm2d(norm.num_features, splits, eps=norm.eps, momentum=norm.momentum)
    split.weight, split.bias = norm.weight, norm.bias
    split.running_mean, split.running_var = norm.running_mean, norm.running_var
    split.num_batches_tracked = norm.num_batches_tracked
    split.affine, split.track_running_stats, split.training = norm.affine, norm.track_running_stats, norm.training
    after = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    return nn.Sequential(split, *after) if after else split
