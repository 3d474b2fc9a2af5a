"""The accuracy of the online probes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class Share(Metric):
    """Share of the counted images that were right, over all batches and ranks.

    Differs from `torchmetrics.MeanMetric`: never reads a value on the host, which that does to look for NaN, and which
    without that look (``nan_strategy="disable"``) leaves its weights out of account (torchmetrics 1.9).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    right: Tensor
    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("counted", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, right: Tensor, counted: Tensor) -> None:
        """Add a batch.

        Args:
            right: Whether the prediction was right, ``(B,)``, bool.
            counted: Whether the image counts, ``(B,)``, bool.
        """
        self.right += (right & counted).sum()
        self.counted += counted.sum()

    def compute(self) -> Tensor:
        """Return the share, a scalar in 0..1, NaN where nothing was counted."""
        return self.right / self.counted
