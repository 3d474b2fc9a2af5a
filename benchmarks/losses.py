"""NT-Xent forward and backward beside its peers: time, and peak memory in a process of its own each.

python -m benchmarks.losses
"""

import math
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.common import alternate, memory_growth_mib, peak_memory_mib, report
from lightning_contrast import losses

DIM, TEMPERATURE, THREADS = 128, 0.1, 2


Step = Callable[[], None]


def _step(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], pairs: int) -> Step:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(pairs, DIM, generator=generator, requires_grad=True) for _ in range(2))

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


def main() -> None:
    rows = []
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
    note = f"NT-Xent of pairs of width {DIM}, float32, forward and backward, {THREADS} threads, median of 3."
    report("losses", rows, note)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if len(sys.argv) > 1:
        _ours(64)()  # what a first backward allocates once is not the loss's
        print(memory_growth_mib(FORMS[sys.argv[1]](int(sys.argv[2]))))
    else:
        main()
