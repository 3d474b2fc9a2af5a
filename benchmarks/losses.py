"""NT-Xent, Barlow Twins and VICReg, forward and backward: time, and peak memory, each in its own process.

Run with ``python -m benchmarks.losses``.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.common import alternate, memory_growth_mib, peak_memory_mib, report
from lightning_contrast import losses
from lightning_contrast.losses.contrastive import naive_nt_xent

DIM, WIDE, TEMPERATURE, THREADS = 128, 8192, 0.1, 2


Step = Callable[[], None]


def _step(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], pairs: int, dim: int = DIM) -> Step:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(pairs, dim, generator=generator, requires_grad=True) for _ in range(2))

    def step() -> None:
        a.grad = b.grad = None
        loss(a, b).backward()

    return step


def _ours(pairs: int) -> Step:
    return _step(partial(losses.nt_xent, temperature=TEMPERATURE), pairs)


def _learned(pairs: int) -> Step:
    return _step(partial(losses.nt_xent, temperature=torch.tensor(TEMPERATURE, requires_grad=True)), pairs)


def _lightly(pairs: int) -> Step:
    from lightly.loss import NTXentLoss

    return _step(NTXentLoss(temperature=TEMPERATURE), pairs)


def _metric_learning(pairs: int) -> Step:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return _step(SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE)), pairs)


def _dense(pairs: int) -> Step:
    return _step(partial(naive_nt_xent, temperature=TEMPERATURE), pairs)


def _products(pairs: int) -> Step:
    z = torch.randn(2 * pairs, DIM)

    def step() -> None:
        similarities = z @ z.T
        similarities @ z
        similarities.T @ z

    return step


def _barlow_twins(pairs: int) -> Step:
    return _step(partial(losses.barlow_twins_loss, off_diagonal_weight=0.0051), pairs, WIDE)


def _vicreg(pairs: int) -> Step:
    return _step(losses.vicreg_loss, pairs, WIDE)


def _correlation_alone(pairs: int) -> Step:
    """Return the minimum work with a materialized correlation matrix: the matrix and the gradients of its factors."""
    a, b = torch.randn(pairs, WIDE), torch.randn(pairs, WIDE)

    def step() -> None:
        c = a.T @ b  # (D, D), which stands in for its gradient below
        b @ c.T
        a @ c

    return step


FORMS: dict[str, Callable[[int], Step]] = {
    "lightning_contrast": _ours,
    "lightning_contrast, learned temperature": _learned,
    "three dense products": _products,
    "dense torch": _dense,
    "lightly": _lightly,
    "pytorch-metric-learning": _metric_learning,
}
# pytorch-metric-learning compares all pairs with all pairs: 1,024 would need 34 GB. Only ours fits at 32,768.
SIZES = {256: list(FORMS), 8192: list(FORMS)[:-1], 32768: ["lightning_contrast"]}
REDUNDANCY: dict[str, Callable[[int], Step]] = {
    f"Barlow Twins, width {WIDE}": _barlow_twins,
    f"VICReg, width {WIDE}": _vicreg,
    f"one product a'b and its gradients, width {WIDE}": _correlation_alone,
}


def redundancy_rows() -> list[dict[str, Any]]:
    """Return the rows of Barlow Twins and VICReg; "x ours" is relative to Barlow Twins."""
    rows = []
    for pairs in (256, 2048):
        times = alternate({name: form(pairs) for name, form in REDUNDANCY.items()}, repeats=3 if pairs < 1024 else 1)
        ours = next(iter(times.values()))["median_s"]
        for name, seconds in times.items():
            row = {"pairs": pairs, "form": name, "seconds": seconds["median_s"], "min_s": seconds["min_s"]}
            memory = peak_memory_mib("benchmarks.losses", name, str(pairs))
            rows.append(row | {"x ours": seconds["median_s"] / ours, "extra MiB": memory})
    return rows


def main() -> None:
    rows: list[dict[str, Any]] = []
    for pairs, names in SIZES.items():
        alone = len(names) == 1  # a single form, and a long call
        times = alternate(
            {name: FORMS[name](pairs) for name in names}, repeats=1 if alone else 3, warmup=0 if alone else 1
        )
        ours = times["lightning_contrast"]["median_s"]
        for name in names:
            seconds = times[name]["median_s"]
            row = {"pairs": pairs, "form": name, "seconds": seconds, "min_s": times[name]["min_s"]}
            memory = peak_memory_mib("benchmarks.losses", name, str(pairs))
            rows.append(row | {"x ours": seconds / ours, "extra MiB": memory})
    rows += redundancy_rows()
    note = f"NT-Xent of pairs of width {DIM} unless stated, float32, forward and backward, {THREADS} threads."
    report("losses", rows, note)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if len(sys.argv) > 1:
        _ours(64)()  # one-time allocations of the first backward do not count
        print(memory_growth_mib((FORMS | REDUNDANCY)[sys.argv[1]](int(sys.argv[2]))))
    else:
        main()
