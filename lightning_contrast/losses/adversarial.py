"""Contrast of an adversarial view with the two clean views: RoCL."""

import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_positive
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import check_pair
from lightning_contrast.precision import full_precision, normalize


@full_precision
def rocl_loss(z_a: Tensor, z_b: Tensor, z_adversarial: Tensor | None = None, *, temperature: float) -> Tensor:
    """Compute RoCL's contrastive loss of three views, whose gradient flows through the anchors only.

    Implements Eq. 6 of RoCL (https://arxiv.org/abs/2006.07589) as its reference implementation: the sum over the six
    ordered pairs of views of an image, divided by the number of views, hence twice the mean over the pairs. A
    denominator holds all other embeddings of the global batch, those of the image's other views included. Inputs are
    L2-normalized here.
    Differs from it: no constants are added to norms and logarithms. With two views it is NT-Xent with keys that have
    no gradient, the loss that the attack maximizes.

    Args:
        z_a: Embeddings of the first view, ``(B, D)``.
        z_b: Embeddings of the second view, ``(B, D)``.
        z_adversarial: Embeddings of the adversarial view, ``(B, D)``; None leaves it out.
        temperature: Divisor of the cosine similarities, > 0; 0.5 in the paper.

    Returns:
        The mean over the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If the shapes differ, the batch is smaller than 2, or the temperature is not above 0.
        TypeError: If the embeddings are not floating point.
    """
    given = [z_a, z_b] if z_adversarial is None else [z_a, z_b, z_adversarial]
    for z in given:
        check_pair("z_a", z_a, "each view", z)
    check_positive("temperature", temperature, "RoCL uses 0.5")
    views = torch.stack([normalize(z) for z in given], dim=1)  # (B, V, D)
    count = len(given)
    keys = distributed.gather(views).flatten(0, 1)  # (G V, D)
    start = count * sum(distributed.batch_sizes(len(z_a), z_a.device)[: distributed.rank()])
    rows = torch.arange(count * len(z_a), device=z_a.device) + start  # place of each anchor among the keys
    columns = torch.arange(len(keys), device=z_a.device)
    itself = columns == rows[:, None]
    logits = (views.flatten(0, 1) @ keys.T / temperature).masked_fill(itself, -torch.inf)
    positive = (columns // count == rows[:, None] // count) & ~itself
    losses = (count - 1) * logits.logsumexp(1) - logits.where(positive, 0.0).sum(1)
    return global_mean(losses.reshape(-1, count).mean(1))
