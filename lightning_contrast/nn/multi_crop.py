"""One forward pass per view size."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor


def forward_by_size(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Return the output of a network for each view, from one pass for each run of views of equal size.

    As in the programs of SwAV, DINO and iBOT: consecutive views of one size are joined along the batch, so BatchNorm
    takes its statistics over all of them, and those of another size apart.

    Args:
        network: What maps images (N, C, h, w) to one output row each, (N, ...).
        views: The views, each (B, C, h, w); only sizes may differ.

    Returns:
        One output (B, ...) for each view, in the order of the views.
    """
    outputs: list[Tensor] = []
    for _, run in groupby(views, key=lambda view: view.shape[-2:]):
        group = list(run)
        # A single view is not copied; joined views are split again in the order in which they were joined.
        joined = network(torch.cat(group) if len(group) > 1 else group[0])
        outputs += torch.split(joined, [len(view) for view in group])
    return outputs
