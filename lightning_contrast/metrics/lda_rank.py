"""LiDAR: effective rank of the between-image relative to the within-image covariance of features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_contrast._checks import check_at_least, check_positive, fail, require
from lightning_contrast.metrics.neighbours import check_features
from lightning_contrast.metrics.spectrum import entropy_rank

DELTA = 1e-4
EPSILON = 1e-7


def lidar(features: Tensor | Sequence[Tensor], groups: Tensor | None = None, *, delta: float = DELTA) -> Tensor:
    """Compute LiDAR of views that are grouped by image.

    Implements https://arxiv.org/abs/2312.04000: exp(H(p)) with ``p = l / sum(l) + 1e-7`` over the eigenvalues ``l`` of
    ``(S_w + delta I)^-1/2 S_b (S_w + delta I)^-1/2``, where ``S_b`` is the between-image covariance of the images'
    mean features and ``S_w`` the within-image covariance of the views around them. The paper uses 1,000 images with 50
    views each; with n images the value is at most n - 1.

    Args:
        features: ``(n, q, D)``, q views of each of n images; a list of q views ``(n, D)``, as a batch contains them,
            row i of each from image i; or ``(N, D)`` with ``groups``.
        groups: Image of each row, ``(N,)`` integers in any order; each image with at least two rows.
        delta: Added to the diagonal of the within-image covariance, > 0; in squared units of the features.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: If shapes do not match or an image has only one view.
    """
    check_positive("delta", delta, "The paper uses 1e-4")
    return _lidar(*_sums(features, groups), delta)


def _sums(features: Tensor | Sequence[Tensor], groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the sums of the within-image covariances, of the means' outer products, of the means; and n."""
    rows, index, count = _grouped(features, groups)
    sizes = torch.bincount(index, minlength=count)
    hint = "Pass at least two views of every image, all views of an image in the same call"
    require(int(sizes.min()) >= 2, "groups", "have at least two rows each", int(sizes.min()), hint)
    weights = 1 / sizes.to(rows.dtype)
    means = rows.new_zeros(count, rows.shape[1]).index_add_(0, index, rows) * weights.unsqueeze(1)
    spread = (rows - means[index]) * weights.sqrt()[index].unsqueeze(1)  # each image counts the same
    return spread.T @ spread, means.T @ means, means.sum(dim=0), torch.tensor(count, device=rows.device)


def _grouped(features: Tensor | Sequence[Tensor], groups: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Return rows ``(N, D)`` in float64, the image index 0..n-1 of each ``(N,)``, and n."""
    if not isinstance(features, Tensor):
        shapes = [tuple(view.shape) for view in features]
        same = len(set(shapes)) == 1 and len(shapes[0]) == 2
        require(same, "features", "be views of equal 2-D shapes", shapes, "Row i of each view must be image i")
        features = torch.stack(list(features), dim=1)
    if groups is None:
        hint = "Pass (n, q, D), a list of q views (n, D), or `groups`, the image of each row"
        require(features.ndim == 3, "features", "be 3-D if `groups` is None", tuple(features.shape), hint)
        n, q, _ = features.shape
        index, features = torch.arange(n, device=features.device).repeat_interleave(q), features.flatten(0, 1)
        count = n
    else:
        if groups.shape != features.shape[:1] or groups.is_floating_point():
            hint = "Pass the index of the image of each row of `features` (N, D)"
            fail("groups", f"be integers of shape ({len(features)},)", f"{tuple(groups.shape)} {groups.dtype}", hint)
        names, index = torch.unique(groups, return_inverse=True)
        count = len(names)
    check_features("features", features)
    require(count > 0, "features", "have rows", tuple(features.shape), "Pass at least two images")
    return features.detach().double(), index.to(features.device), count


def _lidar(within: Tensor, outer: Tensor, total: Tensor, count: Tensor, delta: float) -> Tensor:
    """Compute LiDAR from the sums over images."""
    images = int(count)
    require(images >= 2, "features", "contain at least two images", images, "Pass more images")
    mean = total / images
    between = (outer / images - mean.outer(mean)).cpu()
    scatter = (within / images).cpu() + delta * torch.eye(len(mean), dtype=mean.dtype)
    values, vectors = torch.linalg.eigh(scatter)
    whiten = vectors * values.clamp(min=delta).rsqrt()
    eigenvalues = torch.linalg.eigvalsh(whiten.T @ between @ whiten).clamp(min=0.0)
    return entropy_rank(eigenvalues, EPSILON).to(total.device)


class LiDAR(Metric):
    """LiDAR of all images; equal to `lidar` up to rounding.

    All views of an image must be passed in the same call of `update`, on the same rank. Memory is bounded: two float64
    matrices D x D for any number of images.

    Args:
        delta: Added to the diagonal of the within-image covariance, > 0.
        num_features: D; None reads it from the first features. Required if a rank may receive no features.
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> images = torch.eye(5).unsqueeze(1)  # five images in five directions around their mean
        >>> views = images + 0.01 * torch.randn(5, 3, 5, generator=torch.Generator().manual_seed(0))
        >>> metric = LiDAR()
        >>> metric.update(views)
        >>> 3.5 < metric.compute().item() < 4.01
        True
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    within: Tensor
    outer: Tensor
    total: Tensor
    images: Tensor

    def __init__(self, delta: float = DELTA, num_features: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("delta", delta, "The paper uses 1e-4")
        if num_features is not None:
            check_at_least("num_features", num_features, 1)
        width = num_features or 0
        self.delta = delta
        self.add_state("within", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Tensor | Sequence[Tensor], groups: Tensor | None = None) -> None:
        """Update with images and all their views.

        Args:
            features: As for `lidar`: ``(n, q, D)``, a list of q views ``(n, D)``, or ``(N, D)`` with ``groups``.
            groups: Image of each row, ``(N,)`` integers.

        Raises:
            ValueError: If shapes do not match, an image has only one view, or the width differs from before.
        """
        within, outer, total, images = _sums(features, groups)
        if self.total.numel() == 0:
            self.within, self.outer = torch.zeros_like(within), torch.zeros_like(outer)
            self.total = torch.zeros_like(total)
        width, known = len(total), len(self.total)
        require(width == known, "features", f"be {known} wide", width, "Use one metric per layer")
        self.within += within
        self.outer += outer
        self.total += total
        self.images += images

    def compute(self) -> Tensor:
        """Compute LiDAR, a float64 scalar.

        Raises:
            ValueError: If there were fewer than two images.
        """
        return _lidar(self.within, self.outer, self.total, self.images, self.delta)
