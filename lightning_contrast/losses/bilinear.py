"""CURL's loss: a learned bilinear similarity between queries and keys."""

import torch.nn.functional as F
from torch import Tensor

from lightning_contrast._checks import require
from lightning_contrast.distributed import gather_with_gradient, global_mean
from lightning_contrast.losses.checks import check_floating, check_pair
from lightning_contrast.losses.labels import global_classes
from lightning_contrast.precision import full_precision


@full_precision
def bilinear_loss(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """Compute the cross entropy of each query against the keys of the global batch, with similarity ``q W k``.

    Implements the loss of CURL (https://arxiv.org/abs/2004.04136), section 4.3: neither a normalization nor a
    temperature. The similarity matrix is materialized.

    Args:
        query: Embeddings of the anchors, ``(B, D)``.
        key: Embeddings of their positives, ``(B, E)``; CURL's come from a momentum encoder without gradient.
        weight: The matrix W, ``(D, E)``.

    Returns:
        The mean over the queries of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not fit, or the batch is smaller than 2.
        TypeError: If an input is not floating point.

    Example:
        >>> rows = torch.eye(2)
        >>> round(bilinear_loss(rows, rows, 3 * torch.eye(2)).item(), 4)  # log(1 + exp(-3))
        0.0486
    """
    check_floating("weight", weight)
    expected, got = (query.shape[-1], key.shape[-1]), tuple(weight.shape)
    require(got == expected, "weight", f"have the shape {expected}", got, "Give the widths of query and key")
    projected = query @ weight  # (B, E)
    check_pair("query", projected, "key", key)
    keys = gather_with_gradient(key)  # (N, E)
    own, _ = global_classes(None, len(key), key.device)  # (B,): positions of the positives
    return global_mean(F.cross_entropy(projected @ keys.T, own, reduction="none"))
