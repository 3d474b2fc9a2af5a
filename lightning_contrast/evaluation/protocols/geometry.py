"""Geometry of features: spectrum, ranks, uniformity, and the views of one image."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import require
from lightning_contrast.metrics import Alignment, alpha_req, effective_rank, lidar, participation_ratio, rankme
from lightning_contrast.metrics.neighbours import check_features
from lightning_contrast.metrics.spectrum import squared_singular_values
from lightning_contrast.metrics.sphere import uniformity_of
from lightning_contrast.seeding import derived_seed

_ROWS = 4096  # of the uniformity, which compares all pairs
_COLLAPSED, _ONE_DIRECTION = 0.02, 0.15  # spreads
_RANK, _RANK_SHARE, _DEAD = 10.0, 0.08, 0.5  # as in `callbacks.Thresholds`


def geometry(features: Tensor, *, views: Tensor | None = None, spectrum: int = 256, seed: int = 0) -> dict[str, Any]:
    """Measure the geometry of features.

    Ranks grow with the number of rows and of dimensions: compare models of one width on the same images.

    Args:
        features: ``(N, F)``, floating, N >= 2.
        views: Features of views of further images, ``(n, q, F)``: for ``alignment`` and ``lidar``.
        spectrum: Number of eigenvalues to return, >= 1.
        seed: Seed of the sample of 4,096 rows for the uniformity, >= 0.

    Returns:
        ``rankme``, ``effective_rank``, ``participation_ratio``, ``alpha_req`` (None for fewer than two eigenvalues in
        its range), see `metrics`; ``uniformity`` (t = 2); ``std``, the mean standard deviation of L2-normalized
        dimensions times sqrt(F), 1 for rows uniform on the sphere; ``dead_dims``, the share of constant dimensions;
        ``norm``, the mean norm; ``spectrum``, the largest eigenvalues of the covariance as shares of their sum; with
        ``views``, ``alignment`` (of pairs of views, 0 if equal) and ``lidar``.

    Raises:
        ValueError: If shapes do not match.
    """
    check_features("features", features)
    require(len(features) >= 2, "features", "have two rows or more", len(features), "Use more images")
    x = features.detach().double()
    unit = F.normalize(x, dim=1)
    generator = torch.Generator().manual_seed(derived_seed(seed, 8))
    rows = torch.randperm(len(x), generator=generator)[:_ROWS].to(x.device)
    eigenvalues = squared_singular_values(x, center=True)
    deviations = x.std(0, correction=0)
    alpha = float(alpha_req(x))
    found: dict[str, Any] = {
        "rankme": float(rankme(x)),
        "effective_rank": float(effective_rank(x)),
        "participation_ratio": float(participation_ratio(x)),
        "alpha_req": None if math.isnan(alpha) else alpha,
        "uniformity": float(uniformity_of(unit[rows])),
        "std": float(unit.std(0, correction=0).mean()) * math.sqrt(x.shape[1]),
        "dead_dims": float((deviations < 1e-6 * deviations.max().clamp(min=1e-30)).double().mean()),
        "norm": float(x.norm(dim=1).mean()),
        "spectrum": (eigenvalues / eigenvalues.sum().clamp(min=1e-300))[:spectrum].tolist(),
    }
    if views is not None:
        fits = views.ndim == 3 and views.shape[1] >= 2 and views.shape[2] == x.shape[1]
        require(fits, "views", f"be (n, q, {x.shape[1]}), q >= 2", tuple(views.shape), "Give views of each image")
        metric = Alignment()
        metric.update(views[:, 0], views[:, 1])
        found |= {"alignment": float(metric.compute()), "lidar": float(lidar(views))}
    return found


def describe_geometry(found: dict[str, Any], width: int) -> str:
    """Return a sentence that says whether features have collapsed.

    A spread (``std``) below 0.02, a mean cosine above about 0.9996, is a complete collapse. Features that point in one
    direction can still tell images apart: those of an untrained "small_convnet" have a spread of 0.11. An effective
    rank below 10 and below 8 % of the dimensions is a dimensional collapse, as in `CollapseMonitor`.

    Args:
        found: Values of `geometry`.
        width: Number of dimensions F.
    """
    rank, spread = found["effective_rank"], found["std"]
    if spread < _COLLAPSED:
        return f"Collapsed: all images have nearly the same features (spread {spread:.3f} of 1)."
    if rank < min(_RANK, max(1.5, _RANK_SHARE * width)):
        return f"Dimensional collapse: {rank:.1f} of {width} dimensions are in use."
    if found["dead_dims"] > _DEAD:
        return f"{found['dead_dims']:.0%} of the {width} dimensions are constant."
    words = f"No collapse: about {rank:.0f} of {width} dimensions are in use, spread {spread:.2f} of 1"
    if spread < _ONE_DIRECTION:
        return f"{words}; all features point in nearly one direction, so center them before comparing cosines."
    return f"{words}."
