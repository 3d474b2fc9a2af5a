"""Structured pruning: whole output channels of convolutions and linear layers become 0."""

import copy

from torch import nn
from torch.nn.utils import prune

from lightning_contrast._checks import check_interval, require


def prune_channels(network: nn.Module, share: float) -> nn.Module:
    """Return a copy of a network whose output channels of the smallest L2 norm have the weight 0.

    Of each convolution and each linear layer the given share of its output channels, by the norm of their weights; the
    last such layer, whose outputs may be the features, is left alone, and biases are kept. Shapes stay the same, so the
    weights load into the same network: a file is smaller, and a network faster, only for tools that make use of zeros.

    Source: torch's ``torch.nn.utils.prune.ln_structured`` (n = 2, dim = 0).

    Args:
        network: Maps images ``(B, C, h, w)`` to features ``(B, F)``; it is not modified.
        share: Share of the channels of each layer, in [0, 1); rounded to whole channels.

    Raises:
        ValueError: If the share is out of range, or there is no such layer.

    Example:
        >>> import torch
        >>> network = prune_channels(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3)), 0.5)
        >>> int((network[0].weight == 0).all(dim=1).sum()), bool((network[1].weight == 0).any())
        (2, False)
    """
    check_share("share", share)
    found = copy.deepcopy(network)
    layers = [module for module in found.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    hint = "Give a network with at least two such layers"
    require(len(layers) > 1, "network", "have convolutions or linear layers to prune", type(network).__name__, hint)
    for layer in layers[:-1]:
        if round(share * layer.weight.shape[0]) > 0:
            prune.ln_structured(layer, "weight", amount=share, n=2, dim=0)  # type: ignore[no-untyped-call]
            prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    return found


def check_share(name: str, share: float) -> None:
    """Check that a share of channels lies in [0, 1)."""
    check_interval(name, share, "[0, 1)", "0.3 prunes 30 % of the channels of each layer")
