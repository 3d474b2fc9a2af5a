"""Group DRO: a classifier's loss on its worst groups."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_positive, fail
from lightning_contrast.losses.checks import check_labels, check_matrix
from lightning_contrast.precision import full_precision


class GroupDRO(nn.Module):
    """Cross entropy weighted by group, where groups with a high loss gain weight step by step.

    Implements Algorithm 1 of group DRO (https://arxiv.org/abs/1911.08731) as its reference implementation without
    adjustment: with the mean loss L_g of each group in the batch, ``q_g <- q_g exp(step_size L_g)``, normalized to sum
    1, and the loss is ``sum_g q_g L_g``. A group that is not in the batch has the loss 0. The paper needs strong weight
    decay or few epochs with it: a network that fits all training images has no worst group.

    The weights are float32 under every precision, part of the checkpoint, and, since the means are over the images of
    all ranks, the same on every rank. They change once per call in training mode, with accumulation in each
    micro-batch, and never if a loss is not finite.

    Args:
        groups: Number of groups G, >= 1; usually one for each pair of a class and an attribute.
        step_size: How fast the weights change, > 0; 0.01 in the paper.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If ``groups`` is not a whole number.

    Example:
        >>> loss = GroupDRO(groups=2)
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> round(float(loss(logits, torch.tensor([0, 1]), torch.tensor([0, 1]))), 4)
        1.1319
        >>> loss.group_weights  # the second group is classified wrongly
        tensor([0.4950, 0.5050])
    """

    bits: Tensor

    def __init__(self, groups: int, step_size: float = 0.01) -> None:
        super().__init__()
        check_at_least("groups", groups, 1)
        check_positive("step_size", step_size, "The paper uses 0.01")
        self.groups, self.step_size = groups, step_size
        # Strategies cast floating buffers but not integers, so the floats are kept as integers of equal bits.
        self.register_buffer("bits", torch.full((groups,), 1 / groups, dtype=torch.float32).view(torch.int32))

    @property
    def group_weights(self) -> Tensor:
        """Return a copy of the weights q, ``(G,)`` float32, without gradient; their sum is 1."""
        return self.bits.view(torch.float32).clone()

    def forward(self, logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        """Return the weighted loss, and update the weights in training mode.

        Args:
            logits: ``(B, C)``.
            labels: Classes, ``(B,)`` integers in 0 .. C - 1; images with one below 0 are left out.
            groups: ``(B,)`` integers in 0 .. G - 1; images with one below 0 are left out.

        Returns:
            A scalar in nats, over the images of all ranks.

        Raises:
            ValueError: If shapes do not match, or, on the CPU, a group is not below G.
            TypeError: If the logits are not floating point, or labels or groups not integers.
        """
        check_matrix("logits", logits)
        check_labels(labels, len(logits))
        check_labels(groups, len(logits), "groups")
        if groups.device.type == "cpu" and len(groups) and int(groups.max()) >= self.groups:  # no device to wait for
            hint = "Give the number of groups to GroupDRO"
            fail("groups", f"be below {self.groups}", int(groups.max()), hint)
        means = _group_means(logits, labels, groups, self.groups)  # (G,)
        weights, losses = self.group_weights, means.detach().float()
        if self.training:
            moved = weights * (self.step_size * losses).exp()
            weights = torch.where(losses.isfinite().all(), moved / moved.sum(), weights)
            self.bits.copy_(weights.view(torch.int32))
        return (weights.to(means.dtype) * means).sum()

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"groups={self.groups}, step_size={self.step_size}"


@full_precision
def _group_means(logits: Tensor, labels: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the mean cross entropy of each group over the images of all ranks, ``(G,)``; 0 for one without images."""
    known = (labels >= 0) & (groups >= 0)
    losses = F.cross_entropy(logits, labels.long().clamp(min=0), reduction="none").masked_fill(~known, 0.0)
    places = groups.long().clamp(min=0)
    zeros = torch.zeros(count, dtype=losses.dtype, device=losses.device)
    own = zeros.index_add(0, places, losses)
    images = zeros.index_add(0, places, known.to(losses.dtype))
    total, images = distributed.all_reduce_sum(torch.stack([own.detach(), images])).unbind()
    images = images.clamp(min=1)
    share = own * distributed.world_size() / images
    return share + (total / images - share.detach())
