"""Robustness of a classifier against the corruptions of ImageNet-C and CIFAR-10-C."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, require
from lightning_contrast.augment.corruptions import CORRUPTIONS, corrupt
from lightning_contrast.evaluation.protocols.inputs import check_image_labels

SMALL = 64
"""Images up to this edge get the severities of CIFAR-10-C, larger ones those of ImageNet-C."""


@torch.no_grad()
def corruption_robustness(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    table: Literal["imagenet", "cifar"] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    cache: MutableMapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return which images a classifier gets right when they are corrupted (https://arxiv.org/abs/1903.12261).

    `mean_corruption_error` takes the means of the rows.

    Args:
        predict: Maps images ``(B, C, H, W)``, uint8, to logits ``(B, classes)``: preprocessing, network and head, such
            as `logistic_head` of clean training images.
        images: ``(N, C, H, W)``, uint8, N >= 1.
        labels: Classes ``(N,)``, integers >= 0.
        corruptions: Names of `augment.CORRUPTIONS` and `augment.HELD_OUT_CORRUPTIONS`.
        severities: Of 1 to 5.
        table: Parameters of "imagenet" or "cifar", see `augment.corrupt`; None is "cifar" up to 64 pixels.
        batch_size: Images per pass, >= 1; the results do not depend on it.
        seed: Seed of the corruption of the first image, >= 0; image i has seed + i.
        cache: Keeps the corrupted images for a call with another classifier and the same arguments.

    Returns:
        "clean", bool ``(N,)``, and by corruption bool ``(severities, N)``, on the CPU.

    Raises:
        ValueError: If a name, number or shape is not one of those above.
        TypeError: If the images are not uint8.

    Example:
        >>> images, labels = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8), torch.tensor([0, 1])
        >>> found = corruption_robustness(
        ...     lambda of: torch.eye(2)[(of.float().mean((1, 2, 3)) > 120).long()],
        ...     images,
        ...     labels,
        ...     corruptions=["brightness"],
        ...     severities=[1, 5],
        ... )
        >>> found["clean"].tolist(), found["brightness"].tolist()
        ([True, False], [[True, False], [False, True]])
    """
    check_at_least("batch_size", batch_size, 1)
    check_image_labels(images, labels)
    require(len(severities) > 0, "severities", "be some of 1 to 5", [*severities], "The benchmark has all five")
    require(len(corruptions) > 0, "corruptions", "be some names", [*corruptions], "The benchmark has 15")
    used = table or ("cifar" if max(images.shape[-2:]) <= SMALL else "imagenet")
    check_choice("table", used, ("imagenet", "cifar"))
    truth = labels.cpu()

    def right(given: Tensor) -> Tensor:
        logits = torch.cat([predict(part).cpu() for part in torch.split(given, batch_size)])
        return logits.argmax(1) == truth

    def corrupted(name: str, severity: int) -> Tensor:
        key = f"{name} {severity}"
        if cache is not None and key in cache:
            return cache[key]
        parts = [
            corrupt(part, name, severity=severity, seed=seed + batch_size * place, table=used)
            for place, part in enumerate(torch.split(images, batch_size))
        ]
        found = torch.cat(parts)
        if cache is not None:
            cache[key] = found
        return found

    found = {"clean": right(images)}
    for name in corruptions:
        found[name] = torch.stack([right(corrupted(name, severity)) for severity in severities])
    return found
