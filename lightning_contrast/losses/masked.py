"""Losses that predict the representation of masked parts of an image."""

import torch.nn.functional as F
from torch import Tensor

from lightning_contrast._checks import fail
from lightning_contrast.losses._prepare import check_floating, full_precision, global_mean


@full_precision
def ijepa_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the smooth L1 distance of predicted patch features to the teacher's.

    Implements the loss of I-JEPA (https://arxiv.org/abs/2301.08243) as in the authors' program: smooth L1 with beta 1,
    to targets that are layer-normalised here without affine parameters. The target receives no gradient.
    Differs from it: the paper writes an L2 distance.

    Args:
        prediction: Output of the predictor at the target blocks, ``(B, ..., D)``.
        target: Output of the target encoder at the same patches, ``(B, ..., D)``.

    Returns:
        The mean over images of all ranks, patches and features, a scalar.

    Raises:
        ValueError: If the shapes differ or there is no feature dimension.
        TypeError: If the inputs are not floating point.
    """
    check_floating("prediction", prediction)
    check_floating("target", target)
    if prediction.ndim < 2 or prediction.shape != target.shape:
        shapes = tuple(prediction.shape), tuple(target.shape)
        fail("prediction", "have the target's shape (B, ..., D)", shapes, "Give the features of the same patches")
    goal = F.layer_norm(target.detach(), target.shape[-1:])
    return global_mean(F.smooth_l1_loss(prediction, goal, reduction="none").flatten(1).mean(1))
