"""Linear CKA: how alike two representations of the same images are, whatever their rotation and scale."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_contrast._checks import fail, require
from lightning_contrast.metrics.neighbours import check_features


def cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Return the linear centred kernel alignment of two representations of the same images.

    Implements https://arxiv.org/abs/1905.00414, Eq. 5: ``|Y^T X|^2 / (|X^T X| |Y^T Y|)`` (Frobenius norms) of centred
    features. ``unbiased=True`` takes the unbiased HSIC estimate of https://arxiv.org/abs/2010.15327, Eq. 3, in its
    place, which does not grow as images get fewer and may fall slightly below 0. Computed in float64.

    Args:
        x: ``(N, D)``, floating, N >= 2.
        y: ``(N, E)``, row i of the same image as row i of ``x``.
        unbiased: Take the unbiased estimate; needs N >= 4.

    Returns:
        A float64 scalar; 1 where one is a rotation and scaling of the other. NaN where one is constant.

    Raises:
        ValueError: If the numbers of rows differ or are too few.
    """
    x, y = _pair(x, y, 4 if unbiased else 2)
    if unbiased:
        both, first, second = _hsic1(x, y)
    else:
        x, y = x - x.mean(dim=0), y - y.mean(dim=0)
        both, first, second = _products(x.T @ x, y.T @ y, x.T @ y)
    return both / (first * second).sqrt()


def _pair(x: Tensor, y: Tensor, minimum: int) -> tuple[Tensor, Tensor]:
    check_features("x", x)
    check_features("y", y)
    sizes = (len(x), len(y))
    require(len(x) == len(y), "x", "have as many rows as `y`", sizes, "Row i of both is image i")
    require(len(x) >= minimum, "x", f"have at least {minimum} rows", len(x), "Give larger batches")
    return x.detach().double(), y.detach().double()


def _hsic1(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unbiased HSIC of (x, y), (x, x) and (y, y)."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)  # changes nothing but the rounding
    kernel_x, kernel_y = (z @ z.T for z in (x, y))
    n = len(x)
    for kernel in (kernel_x, kernel_y):
        kernel.fill_diagonal_(0.0)
    sums_x, sums_y = kernel_x.sum(dim=0), kernel_y.sum(dim=0)

    def hsic(k: Tensor, m: Tensor, k_sums: Tensor, m_sums: Tensor) -> Tensor:
        middle = k_sums.sum() * m_sums.sum() / ((n - 1) * (n - 2))
        return ((k * m).sum() + middle - 2 / (n - 2) * (k_sums * m_sums).sum()) / (n * (n - 3))

    return (
        hsic(kernel_x, kernel_y, sums_x, sums_y),
        hsic(kernel_x, kernel_x, sums_x, sums_x),
        hsic(kernel_y, kernel_y, sums_y, sums_y),
    )


def _products(xx: Tensor, yy: Tensor, xy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the squared norm of the cross products and those of each with itself."""
    return xy.square().sum(), xx.square().sum(), yy.square().sum()


class CKA(Metric):
    """Linear CKA of two representations of the same images over any number of batches and ranks.

    ``unbiased=True``: the minibatch form of https://arxiv.org/abs/2010.15327: the unbiased HSIC estimates of the
    batches are averaged (each batch counts the same) and then divided. Its expectation does not depend on the batch
    size; it keeps four numbers. ``unbiased=False``: Eq. 5 of https://arxiv.org/abs/1905.00414 on all rows, exactly,
    however they were cut into batches; it keeps D^2 + E^2 + D E float64 numbers.

    Args:
        unbiased: Which of the two.
        kwargs: Of `torchmetrics.Metric`.

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
            fail("unbiased", "be True or False", unbiased, "Give a bool", TypeError)
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
        """Add a batch.

        Args:
            x: ``(B, D)``, floating; B >= 4 where ``unbiased``.
            y: ``(B, E)``, row i of the same image as row i of ``x``.

        Raises:
            ValueError: If the numbers of rows differ or are too few, or the widths differ from before.
        """
        x, y = _pair(x, y, 4 if self.unbiased else 1)
        if self.unbiased:
            self.hsic += torch.stack(_hsic1(x, y))
            self.count += 1
            return
        if self.xx.numel() == 0:
            wide, tall = x.shape[1], y.shape[1]
            self.xx, self.yy, self.xy = x.new_zeros(wide, wide), x.new_zeros(tall, tall), x.new_zeros(wide, tall)
            self.x_total, self.y_total = x.new_zeros(wide), x.new_zeros(tall)
        widths, known = (x.shape[1], y.shape[1]), tuple(self.xy.shape)
        require(widths == known, "x and y", f"be {known} wide", widths, "Use one metric for each pair of layers")
        self.xx += x.T @ x
        self.yy += y.T @ y
        self.xy += x.T @ y
        self.x_total += x.sum(dim=0)
        self.y_total += y.sum(dim=0)
        self.count += len(x)

    def compute(self) -> Tensor:
        """Return CKA, a float64 scalar; NaN where one representation is constant.

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
