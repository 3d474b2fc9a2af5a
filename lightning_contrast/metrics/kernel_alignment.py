"""Centered kernel alignment (CKA): similarity of two representations up to rotation and scale."""

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_contrast._checks import check_choice, check_positive, fail, require
from lightning_contrast.metrics.neighbours import check_features


def cka(
    x: Tensor,
    y: Tensor,
    *,
    unbiased: bool = False,
    kernel: Literal["linear", "rbf"] = "linear",
    rbf_threshold: float = 0.5,
) -> Tensor:
    """Compute the centered kernel alignment (CKA) of two representations of the same images.

    Implements https://arxiv.org/abs/1905.00414, Eq. 5: ``|Y^T X|^2 / (|X^T X| |Y^T Y|)`` (Frobenius norms) of centered
    features. ``unbiased=True`` instead uses the unbiased HSIC estimate of https://arxiv.org/abs/2010.15327, Eq. 3,
    which does not grow with fewer images and may be slightly below 0. ``kernel="rbf"`` replaces the inner products by
    ``exp(-|a - b|^2 / (2 s^2))``, where s^2 is ``rbf_threshold^2`` times the median of all squared distances, the zeros
    of the diagonal included, as in the authors' code; it needs N x N numbers. Computed in float64.

    Args:
        x: Features ``(N, D)``, floating, N >= 2.
        y: Features ``(N, E)``, row i of the same image as row i of ``x``.
        unbiased: Use the unbiased estimate; requires N >= 4.
        kernel: "linear" or "rbf".
        rbf_threshold: Bandwidth of the RBF kernel as a share of the root of the median squared distance, > 0.

    Returns:
        A float64 scalar; 1 if one is a rotation and scaling of the other, NaN if one is constant.

    Raises:
        ValueError: If the numbers of rows differ or are too few, or an argument is out of range.
    """
    x, y = _pair(x, y, 4 if unbiased else 2)
    check_choice("kernel", kernel, ("linear", "rbf"))
    check_positive("rbf_threshold", rbf_threshold)
    if kernel == "rbf":
        grams = _rbf(x, rbf_threshold), _rbf(y, rbf_threshold)
        both, first, second = _hsic1_of(*grams) if unbiased else _hsic0_of(*grams)
    elif unbiased:
        both, first, second = _hsic1(x, y)
    else:
        x, y = x - x.mean(dim=0), y - y.mean(dim=0)
        both, first, second = _products(x.T @ x, y.T @ y, x.T @ y)
    return both / (first * second).sqrt()


def _pair(x: Tensor, y: Tensor, minimum: int) -> tuple[Tensor, Tensor]:
    check_features("x", x)
    check_features("y", y)
    sizes = (len(x), len(y))
    require(len(x) == len(y), "x", "have as many rows as `y`", sizes, "Row i of both must be image i")
    require(len(x) >= minimum, "x", f"have at least {minimum} rows", len(x), "Use larger batches")
    return x.detach().double(), y.detach().double()


def _hsic1(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the unbiased HSIC of (x, y), (x, x) and (y, y)."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)  # for smaller rounding errors only
    return _hsic1_of(x @ x.T, y @ y.T)


def _rbf(x: Tensor, threshold: float) -> Tensor:
    """Compute the RBF kernel matrix ``(N, N)`` of rows ``(N, D)``."""
    products = x @ x.T
    norms = products.diagonal()
    distances = (norms.unsqueeze(1) + norms - 2 * products).clamp(min=0.0)
    flat = distances.flatten().sort().values
    median = (flat[(len(flat) - 1) // 2] + flat[len(flat) // 2]) / 2
    return torch.exp(-distances / (2 * threshold**2 * median))


def _hsic0_of(kernel_x: Tensor, kernel_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the biased HSIC, times (n - 1)^2, of (x, y), (x, x) and (y, y) from kernels ``(n, n)``."""
    x, y = (k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in (kernel_x, kernel_y))
    return (x * y).sum(), x.square().sum(), y.square().sum()


def _hsic1_of(kernel_x: Tensor, kernel_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the unbiased HSIC of (x, y), (x, x) and (y, y) from kernels ``(n, n)``, whose diagonals are cleared."""
    n = len(kernel_x)
    for kernel in (kernel_x, kernel_y):
        kernel.fill_diagonal_(0.0)
    sums_x, sums_y = kernel_x.sum(dim=0), kernel_y.sum(dim=0)

    def hsic(k: Tensor, m: Tensor, k_sums: Tensor, m_sums: Tensor) -> Tensor:
        """Estimate from kernels ``(n, n)`` and their row sums ``(n,)``."""
        middle = k_sums.sum() * m_sums.sum() / ((n - 1) * (n - 2))
        return ((k * m).sum() + middle - 2 / (n - 2) * (k_sums * m_sums).sum()) / (n * (n - 3))

    return (
        hsic(kernel_x, kernel_y, sums_x, sums_y),
        hsic(kernel_x, kernel_x, sums_x, sums_x),
        hsic(kernel_y, kernel_y, sums_y, sums_y),
    )


def _products(xx: Tensor, yy: Tensor, xy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the squared norms of the cross product and of each product with itself."""
    return xy.square().sum(), xx.square().sum(), yy.square().sum()


class CKA(Metric):
    """Linear CKA of two representations of the same images over any number of batches and ranks.

    ``unbiased=True`` is the minibatch form of https://arxiv.org/abs/2010.15327: the ratio of the unbiased HSIC
    estimates, averaged over batches with equal weights. Its expectation does not depend on the batch size; the state
    is four numbers. ``unbiased=False`` is Eq. 5 of https://arxiv.org/abs/1905.00414 over all rows, exact for any split
    into batches; the state is D^2 + E^2 + D E float64 numbers.

    Args:
        unbiased: Which of the two forms.
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        >>> metric = CKA()
        >>> metric.update(x, 3 * x.flip(1))
        >>> round(metric.compute().item(), 4)
        1.0
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    hsic: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor
    x_total: Tensor
    y_total: Tensor
    count: Tensor

    def __init__(self, unbiased: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(unbiased, bool):
            fail("unbiased", "be True or False", unbiased, "Pass a bool", TypeError)
        self.unbiased = unbiased
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        empty = torch.zeros(0, 0, dtype=torch.float64)
        if unbiased:
            self.add_state("hsic", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        else:
            for name in ("xx", "yy", "xy"):
                self.add_state(name, empty.clone(), dist_reduce_fx="sum")
            for name in ("x_total", "y_total"):
                self.add_state(name, empty[0:0].flatten().clone(), dist_reduce_fx="sum")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Update with a batch of features.

        Args:
            x: Features ``(B, D)``, floating; B >= 4 if ``unbiased``.
            y: Features ``(B, E)``, row i of the same image as row i of ``x``.

        Raises:
            ValueError: If the numbers of rows differ or are too few, or the widths differ from those before.
        """
        x, y = _pair(x, y, 4 if self.unbiased else 1)
        if self.unbiased:
            self.hsic += torch.stack(_hsic1(x, y))
            self.count += 1
            return
        if self.xx.numel() == 0:
            d, e = x.shape[1], y.shape[1]
            self.xx, self.yy, self.xy = x.new_zeros(d, d), x.new_zeros(e, e), x.new_zeros(d, e)
            self.x_total, self.y_total = x.new_zeros(d), x.new_zeros(e)
        widths, known = (x.shape[1], y.shape[1]), tuple(self.xy.shape)
        require(widths == known, "x and y", f"be {known} wide", widths, "Use one metric per pair of layers")
        self.xx += x.T @ x
        self.yy += y.T @ y
        self.xy += x.T @ y
        self.x_total += x.sum(dim=0)
        self.y_total += y.sum(dim=0)
        self.count += len(x)

    def compute(self) -> Tensor:
        """Compute CKA, a float64 scalar; NaN if one representation is constant.

        Raises:
            ValueError: If there are no images.
        """
        require(int(self.count) > 0, "CKA", "have images", 0, "Call `update` before `compute`")
        if self.unbiased:
            both, first, second = self.hsic / self.count
        else:
            x_mean, y_mean = self.x_total / self.count, self.y_total / self.count
            both, first, second = _products(
                self.xx - self.x_total.outer(x_mean),
                self.yy - self.y_total.outer(y_mean),
                self.xy - self.x_total.outer(y_mean),
            )
        value: Tensor = both / (first * second).sqrt()
        return value
