"""The report's k-NN and linear probes compared with lightly's evaluators and scikit-learn, on the same features.

Run with ``python -m benchmarks.evaluators``.
"""

import argparse
import logging
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytorch_lightning
import torch
from lightly.utils.benchmarking import KNNClassifier, LinearClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from benchmarks.common import alternate, report
from benchmarks.knn import product
from lightning_contrast.evaluation import knn_sweep, linear_grid, linear_probe
from lightning_contrast.evaluation.protocols import LinearProtocol

CLASSES, K, TEMPERATURE, BATCH, RATE, HEADS = 10, 200, 0.1, 1024, 0.1, 26
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def blobs(count: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return features around ten centers and their classes."""
    centers = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return torch.randn(count, width, generator=generator).add_(centers[labels], alpha=0.08), labels


def loader(features: Tensor, labels: Tensor, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader that gathers a batch at once: the default one, row by row, would be most of lightly's time."""
    data = TensorDataset(features, labels)
    order = RandomSampler(data) if shuffle else SequentialSampler(data)
    return DataLoader(data, sampler=BatchSampler(order, BATCH, drop_last=False), batch_size=None)


def lightly_knn(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy that lightly's k-NN evaluator finds."""
    model = KNNClassifier(None, CLASSES, K, TEMPERATURE, 0, 1, topk=(1,))
    trainer = pytorch_lightning.Trainer(accelerator="cpu", **QUIET)
    found = trainer.validate(model, [loader(*train), loader(*test)], verbose=False)
    return next(value for one in found for key, value in one.items() if "top1" in key)


def lightly_linear(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], epochs: int) -> float:
    """Return the accuracy that lightly's linear evaluator finds."""
    torch.manual_seed(0)
    model = LinearClassifier(nn.Identity(), BATCH, RATE, train[0].shape[1], CLASSES, topk=(1,))
    trainer = pytorch_lightning.Trainer(max_epochs=epochs, limit_val_batches=0, accelerator="cpu", **QUIET)
    trainer.fit(model, loader(*train, shuffle=True))
    judge = pytorch_lightning.Trainer(accelerator="cpu", **QUIET)
    return judge.validate(model, loader(*test), verbose=False)[0]["val_top1"]


def scikit_knn(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy of scikit-learn's brute-force search with the same weights."""

    def weights(distance):
        return np.exp((1 - distance) / TEMPERATURE)

    model = KNeighborsClassifier(K, weights=weights, algorithm="brute", metric="cosine")
    model.fit(train[0].numpy(), train[1].numpy())
    return float(model.score(test[0].numpy(), test[1].numpy()))


def scikit_linear(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy of scikit-learn's logistic regression: L-BFGS on all rows, with a penalty."""
    model = LogisticRegression(C=1e-3, max_iter=50).fit(train[0].numpy(), train[1].numpy())
    return float(model.score(test[0].numpy(), test[1].numpy()))


def compare(
    protocol: str, candidates: dict[str, Callable[[], float | None]], repeats: int, within: dict[str, float]
) -> list[dict[str, object]]:
    """Time candidates in turn, check that accuracies are within a distance of the first one's, return rows."""
    top1: dict[str, float | None] = {}

    def kept(name: str) -> Callable[[], None]:
        return lambda: top1.__setitem__(name, candidates[name]())

    times = alternate({name: kept(name) for name in candidates}, repeats=repeats, warmup=0)
    ours = next(iter(candidates))
    for name, distance in within.items():
        assert abs(top1[name] - top1[ours]) <= distance, (name, top1)
    return [
        {
            "protocol": protocol,
            "what": name,
            **timing,
            "x ours": timing["median_s"] / times[ours]["median_s"],
            "top-1": top1[name] if top1[name] is not None else "",
        }
        for name, timing in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"rows": 50_000, "width": 2048, "queries": 2000, "epochs": 3, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    train, test = blobs(options.rows, options.width, 1), blobs(options.queries, options.width, 2)
    both = (*train, *test)
    rows = compare(
        f"k-NN, k = {K}",
        {
            "lightning_contrast": lambda: knn_sweep(*both, k=[K], temperature=[TEMPERATURE])[K, TEMPERATURE].top1,
            "lightly": lambda: lightly_knn(train, test),
            "scikit-learn": lambda: scikit_knn(train, test),
            "matrix product alone": lambda: product(test[0], train[0]),
        },
        options.repeats,
        within={"lightly": 0.002, "scikit-learn": 0.002},
    )
    used = LinearProtocol(RATE, epochs=options.epochs, batch_size=BATCH)
    rates = [1e-3 * 100 ** (i / (HEADS - 1)) for i in range(HEADS)]
    steps = options.epochs * math.ceil(options.rows / BATCH)
    rows += compare(
        "linear probe",
        {
            "lightning_contrast": lambda: linear_probe(*both, protocol=used).top1,
            "lightly": lambda: lightly_linear(train, test, options.epochs),
            "scikit-learn, L-BFGS": lambda: scikit_linear(train, test),
            "lightning_contrast, grid of 1 head": lambda: linear_grid(*both, rates=[RATE], steps=steps).top1,
            f"lightning_contrast, grid of {HEADS} heads": lambda: linear_grid(*both, rates=rates, steps=steps).top1,
        },
        options.repeats,
        within={"lightly": 0.03},
    )
    report(
        "evaluators",
        rows,
        f"{options.rows} x {options.width} float32 features of {CLASSES} classes, {options.queries} test rows. k-NN: "
        f"cosine, temperature {TEMPERATURE}, accuracies equal within 0.002. Linear: SGD, {options.epochs} epochs of "
        f"batches of {BATCH}, a cosine from the same rate, lightly's accuracy within 0.03; scikit-learn's is another "
        "algorithm. A grid holds out a tenth of the rows to choose its head and takes as many steps. "
        "lightly's evaluators get a loader that gathers whole batches.",
    )


if __name__ == "__main__":
    main()
