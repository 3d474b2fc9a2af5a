"""Weights that give every group of images the same share of a loss."""

import torch
from torch import Tensor

from lightning_contrast._checks import fail


def balanced_weights(groups: Tensor) -> Tensor:
    """Return a weight per image that is inversely proportional to the size of its group.

    Each group has the same sum, and the mean weight is 1: ``N / (G n_g)``, with the G groups that occur. Use them as
    weights of a loss, or as those of `torch.utils.data.WeightedRandomSampler`. With groups that are pairs of a class
    and an attribute, such as ``2 * label + attribute``, the attribute says nothing about the class afterwards.

    Args:
        groups: Group of each image, ``(N,)`` integers; images with one below 0, which means unknown, get 0.

    Returns:
        ``(N,)`` float32, on the device of the groups.

    Raises:
        TypeError: If ``groups`` is not an integer tensor.
        ValueError: If its shape is not ``(N,)``, or no group is known.

    Example:
        >>> balanced_weights(torch.tensor([0, 0, 0, 1]))
        tensor([0.6667, 0.6667, 0.6667, 2.0000])
    """
    hint = "Pass one group per image"
    if not isinstance(groups, Tensor) or groups.is_floating_point():
        found = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        fail("groups", "be an integer tensor", found, hint, TypeError)
    if groups.ndim != 1:
        fail("groups", "have shape (N,)", tuple(groups.shape), hint)
    known = groups >= 0
    if not bool(known.any()):
        fail("groups", "hold at least one group >= 0", f"{len(groups)} unknown", hint)
    kinds, places, sizes = torch.unique(groups[known], return_inverse=True, return_counts=True)
    weights = torch.zeros(len(groups), device=groups.device)
    weights[known] = int(known.sum()) / (len(kinds) * sizes[places].float())
    return weights
