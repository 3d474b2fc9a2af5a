"""NT-Xent, Barlow Twins and VICReg, forward and backward: time, and peak memory in a process of its own each.

python -m benchmarks.losses
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import alternate, memory_growth_mib, peak_memory_mib, report
from lightning_contrast import losses

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
    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z = F.normalize(torch.cat([a, b]), dim=1)
        me = torch.eye(len(z), dtype=torch.bool)
        logits = (z @ z.T / TEMPERATURE).masked_fill(me, -math.inf)
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))

    return _step(loss, pairs)


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
    """Time what a correlation matrix that is formed needs at least: itself, and the gradients of both its factors."""
    a, b = torch.randn(pairs, WIDE), torch.randn(pairs, WIDE)

    def step() -> None:
        c = a.T @ b  # (D, D), in the place of its gradient below
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
# pytorch-metric-learning compares all pairs with all pairs: 1,024 would take 34 GB. Nothing else fits at 32,768.
SIZES = {256: list(FORMS), 8192: list(FORMS)[:-1], 32768: ["lightning_contrast"]}
REDUNDANCY: dict[str, Callable[[int], Step]] = {
    f"Barlow Twins, width {WIDE}": _barlow_twins,
    f"VICReg, width {WIDE}": _vicreg,
    f"one product a'b and its gradients, width {WIDE}": _correlation_alone,
}


def redundancy_rows() -> list[dict[str, Any]]:
    """Return the rows of Barlow Twins and VICReg; "x ours" is against Barlow Twins."""
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
        alone = len(names) == 1  # nothing to compare with, and a long call
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
    note = f"NT-Xent of pairs of width {DIM} but where said, float32, forward and backward, {THREADS} threads."
    report("losses", rows, note)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if len(sys.argv) > 1:
        _ours(64)()  # what a first backward allocates once is not the loss's
        print(memory_growth_mib((FORMS | REDUNDANCY)[sys.argv[1]](int(sys.argv[2]))))
    else:
        main()
