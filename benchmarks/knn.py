"""The k-NN vote compared with lightly's, with `torch.topk`, and with the matrix product that all of them contain.

Run with ``python -m benchmarks.knn``.
"""

import argparse

import torch
from torch import Tensor

from benchmarks.common import alternate, report
from lightning_contrast.metrics import knn_predict

CLASSES, TEMPERATURE, CHUNK = 10, 0.1, 512


def product(queries: Tensor, bank: Tensor) -> None:
    """Compute the matrix product only, in chunks that reuse one buffer."""
    buffer = queries.new_empty(CHUNK, len(bank))
    for chunk in queries.split(CHUNK):
        torch.mm(chunk, bank.T, out=buffer[: len(chunk)])


def plain_vote(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> Tensor:
    """Compute the same vote with `torch.topk`."""
    predicted = []
    for chunk in queries.split(CHUNK):
        top = (chunk @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(chunk), CLASSES).scatter_add_(1, labels[top.indices], (top.values / TEMPERATURE).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def lightly_vote(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> Tensor:
    """Compute lightly's vote in chunks, as its own evaluation does batch by batch."""
    from lightly.utils.benchmarking import knn_predict as lightly_knn

    transposed = bank.T.contiguous()
    parts = [lightly_knn(c, transposed, labels, CLASSES, knn_k=k, knn_t=TEMPERATURE) for c in queries.split(CHUNK)]
    return torch.cat(parts)[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(options.queries, options.width, generator=generator), dim=1)
    bank = torch.nn.functional.normalize(torch.randn(options.bank, options.width, generator=generator), dim=1)
    labels = torch.randint(0, CLASSES, (options.bank,), generator=generator)
    rows = []
    for k in (20, 200):
        candidates = {
            "matrix product alone": lambda: product(queries, bank),
            "lightning_contrast": lambda k=k: knn_predict(
                queries, bank, labels, num_classes=CLASSES, k=k, temperature=TEMPERATURE
            ),
            "torch.topk": lambda k=k: plain_vote(queries, bank, labels, k),
            "lightly": lambda k=k: lightly_vote(queries, bank, labels, k),
        }
        results = [candidates[name]() for name in ("lightning_contrast", "torch.topk", "lightly")]
        for other in results[1:]:  # rounding may decide between classes with nearly equal votes
            assert (results[0] == other).float().mean() > 0.999, "the votes must agree"
        times = alternate(candidates, repeats=options.repeats, warmup=0)
        product_s = times["matrix product alone"]["median_s"]
        rows += [
            {"k": k, "what": name, **timing, "x product": timing["median_s"] / product_s}
            for name, timing in times.items()
        ]
    report(
        "knn",
        rows,
        f"{options.queries} queries, a bank of {options.bank} x {options.width} float32, weighted vote. "
        "All agree in more than 99.9 % of the predictions.",
    )


if __name__ == "__main__":
    main()
