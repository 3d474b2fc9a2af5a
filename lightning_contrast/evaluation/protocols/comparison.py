"""Whether a difference between two models is more than noise of the test images."""

import math

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.seeding import derived_seed

_DRAWS = 1 << 24  # indices in memory at a time


def bootstrap_interval(
    values: Tensor, *, resamples: int = 10_000, clusters: Tensor | None = None, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean by bootstrap over images.

    Args:
        values: One number per image, ``(N,)``, such as whether it is classified correctly.
        resamples: Draws, >= 100.
        clusters: Group of images that are drawn together, ``(N,)`` integers, such as patients; None: single images.
        seed: Seed of the draws, >= 0.

    Raises:
        ValueError: If shapes do not match or a number is out of range.
    """
    means = _resampled_means(values, resamples, clusters, seed)
    return _percentiles(means)


def paired_bootstrap(
    values_a: Tensor,
    values_b: Tensor,
    *,
    resamples: int = 10_000,
    clusters: Tensor | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Compare two models on the same images by bootstrap: both are resampled together.

    Args:
        values_a: One number per image of model a, ``(N,)``, such as whether it is classified correctly.
        values_b: The same of model b.
        resamples: Draws, >= 100.
        clusters: Group of images that are drawn together, ``(N,)`` integers; None: single images.
        seed: Seed of the draws, >= 0.

    Returns:
        ``difference`` of the means, a - b; ``low`` and ``high`` of its 95 % percentile interval; ``p``, two-sided:
        twice the smaller of the shares of draws that are <= 0 and >= 0, at least 1 / resamples and at most 1.

    Raises:
        ValueError: If shapes do not match or a number is out of range.
    """
    require(values_a.shape == values_b.shape, "values_b", "have the shape of `values_a`", tuple(values_b.shape), _HINT)
    difference = values_a.double() - values_b.double()
    means = _resampled_means(difference, resamples, clusters, seed)
    low, high = _percentiles(means)
    p = 2 * min(float((means <= 0).double().mean()), float((means >= 0).double().mean()))
    return {
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "p": min(1.0, max(p, 1 / resamples)),
    }


def mcnemar(correct_a: Tensor, correct_b: Tensor) -> dict[str, float]:
    """Compare two classifiers on the same images by McNemar's exact test.

    Args:
        correct_a: Whether model a is right, ``(N,)`` bool.
        correct_b: Whether model b is right, ``(N,)`` bool.

    Returns:
        ``only_a`` and ``only_b``, the numbers of images that only one of them has right; ``p``, two-sided, of the
        binomial distribution.

    Raises:
        ValueError: If shapes do not match.

    Example:
        >>> a, b = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
        >>> mcnemar(a, b)["p"]
        0.0625
    """
    fits = correct_a.shape == correct_b.shape and correct_a.ndim == 1
    require(fits, "correct_b", "have the shape (N,) of `correct_a`", tuple(correct_b.shape), _HINT)
    a, b = correct_a.bool(), correct_b.bool()
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    number, fewer = only_a + only_b, min(only_a, only_b)
    logs = [math.lgamma(number + 1) - math.lgamma(i + 1) - math.lgamma(number - i + 1) for i in range(fewer + 1)]
    tail = sum(math.exp(log - number * math.log(2)) for log in logs)
    return {"only_a": only_a, "only_b": only_b, "p": min(1.0, 2 * tail)}


_HINT = "Judge both models on the same images"


def _resampled_means(values: Tensor, resamples: int, clusters: Tensor | None, seed: int) -> Tensor:
    """Return means of images drawn with repetition, ``(resamples,)``, float64."""
    require(values.ndim == 1 and len(values) > 0, "values", "be (N,), N >= 1", tuple(values.shape), _HINT)
    check_at_least("resamples", resamples, 100)
    values = values.detach().double().cpu()
    sizes = torch.ones_like(values)
    if clusters is not None:
        if clusters.shape != values.shape:
            fail("clusters", f"have the shape {tuple(values.shape)}", tuple(clusters.shape), "Give one per image")
        _, place = torch.unique(clusters.cpu(), return_inverse=True)
        count = int(place.max()) + 1
        values = torch.zeros(count, dtype=torch.float64).index_add_(0, place, values)
        sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, place, sizes)
    generator = torch.Generator().manual_seed(derived_seed(seed, 7))
    found, step = [], max(1, _DRAWS // len(values))
    for start in range(0, resamples, step):
        shape = (min(step, resamples - start), len(values))
        index = torch.randint(len(values), shape, generator=generator)
        found.append(values[index].sum(1) / sizes[index].sum(1))
    return torch.cat(found)


def _percentiles(means: Tensor) -> tuple[float, float]:
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high
