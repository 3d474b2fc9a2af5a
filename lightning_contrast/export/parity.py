"""The report that ends every export: how far the features of the file are from those of the network."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_interval, fail
from lightning_contrast.export.samples import Samples
from lightning_contrast.metrics import KNNAccuracy

Runner: TypeAlias = Callable[[Tensor], Tensor]
"""Maps inputs ``(B, ...)`` to features ``(B, F)``."""

EXACT = 1e-4
"""Largest difference of the features of a float file, as a share of the largest feature."""
NEIGHBORS = 20
_BATCH = 16
_TIMED = 8
_ROUNDS = 5
_NAME = "parity.json"


@dataclass(frozen=True)
class ParityReport:
    """How the features of an exported file differ from those of the network, and what the file costs.

    Attributes:
        format: Format of the file.
        source: Where the compared images (or texts) come from, in words.
        images: Their number N.
        cosine_mean: Mean cosine of the two features of an image, -1..1.
        cosine_min: Smallest cosine.
        cosine_p1: First percentile of the cosines, interpolated.
        max_difference: Largest difference of a feature, divided by the largest size of a feature of the network.
        knn_before: Top-1 accuracy of the k-NN vote (k = 20, temperature 0.07) of the network, in 0..1: half of the
            images, drawn with a fixed seed, are the bank, and the others are classified. None without labels.
        knn_after: The same with bank and queries by the file.
        knn_queries: Number of images that are classified.
        bytes_before: Size of the network's weights in memory, without the file's compression.
        bytes_after: Size of the file, or of all files of a folder.
        ms_before: Milliseconds per image of the network, float32 in PyTorch on the CPU: median of 5 rounds.
        ms_after: The same for the file, in the runtime that reads it (PyTorch or ONNX Runtime).
        timed_batch: Images per batch of these times.
        threads: Threads of these times.
        zeros: Share of the weights (not biases or norms) that are 0.
        quantized: Kinds of operators that compute in int8, or layers whose weights are int4.
        left_in_float: Kinds of operators that int8 would have changed too much, with the p1 cosine that each alone has.
        tolerance: The bound that was kept.
    """

    format: str
    source: str
    images: int
    cosine_mean: float
    cosine_min: float
    cosine_p1: float
    max_difference: float
    knn_before: float | None
    knn_after: float | None
    knn_queries: int
    bytes_before: int
    bytes_after: int
    ms_before: float
    ms_after: float
    timed_batch: int
    threads: int
    zeros: float
    tolerance: float
    quantized: list[str] = field(default_factory=list)
    left_in_float: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the report in a few lines."""
        knn = "no labels"
        if self.knn_before is not None and self.knn_after is not None:
            knn = f"{self.knn_before:.4f} before, {self.knn_after:.4f} after ({self.knn_queries} queries)"
        lines = [
            f"{self.format}: compared on {self.source}",
            f"cosine: mean {self.cosine_mean:.6f}, p1 {self.cosine_p1:.6f}, min {self.cosine_min:.6f}",
            f"largest difference: {self.max_difference:.2g} of the largest feature",
            f"k-NN: {knn}",
            f"size: {self.bytes_before / 1e6:.2f} MB before, {self.bytes_after / 1e6:.2f} MB after",
            f"ms per image: {self.ms_before:.2f} before, {self.ms_after:.2f} after (batch {self.timed_batch}, "
            f"{self.threads} threads)",
        ]
        if self.zeros:
            lines.append(f"weights that are 0: {100 * self.zeros:.1f} %")
        if self.quantized:
            lines.append(f"quantized: {', '.join(self.quantized)}")
        if self.left_in_float:
            alone = ", ".join(f"{kind} (p1 cosine {cosine:.4f})" for kind, cosine in self.left_in_float.items())
            lines.append(f"left in float: {alone}")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write the report next to the file that it describes."""
        _place(path).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def read_report(path: str | Path) -> ParityReport:
    """Return the parity report of an exported file or folder.

    Args:
        path: What `export` returned.

    Raises:
        FileNotFoundError: If there is no report.
        ValueError: If it is none.
    """
    place = _place(Path(path))
    if not place.exists():
        fail("path", "have a parity report", str(path), "Give what `export` returned", FileNotFoundError)
    try:
        return ParityReport(**json.loads(place.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError):
        fail("path", "have a parity report", str(place), "Export the model again")


def _place(path: Path) -> Path:
    return path / _NAME if path.is_dir() else path.with_name(f"{path.name}.{_NAME}")


def run_all(runner: Runner, inputs: Tensor, *, batch_size: int = _BATCH) -> Tensor:
    """Return the features of all inputs ``(N, ...)``, ``(N, F)`` float32; the first batch holds one of them."""
    parts = [inputs[:1], *torch.split(inputs[1:], batch_size)]
    with torch.no_grad():
        return torch.cat([runner(part).float().cpu() for part in parts if len(part)])


def cosines(found: Tensor, expected: Tensor) -> Tensor:
    """Return the cosine of each row of two tensors ``(N, F)``, in float64, ``(N,)``."""
    return F.cosine_similarity(found.double(), expected.double(), dim=1)


def first_percentile(values: Tensor) -> float:
    """Return the first percentile of numbers ``(N,)``, interpolated linearly."""
    return float(values.quantile(0.01))


def compare(
    format: str,
    before: Runner,
    after: Runner,
    samples: Samples,
    *,
    tolerance: float,
    network: nn.Module,
    written: nn.Module,
    size: int,
    quantized: list[str] | None = None,
    left_in_float: Mapping[str, float] | None = None,
    expected: Tensor | None = None,
) -> ParityReport:
    """Return the report of a file.

    Args:
        format: Its format.
        before: The network.
        after: The file in its runtime.
        samples: Inputs of both.
        tolerance: Written into the report.
        network: The module of ``before``, for the size of its weights.
        written: The network whose weights were written, for the share of zeros.
        size: Bytes of the file.
        quantized: See `ParityReport`.
        left_in_float: See `ParityReport`.
        expected: Features of ``before`` if they are known, ``(N, F)``.

    Raises:
        RuntimeError: If the file gives features of another shape, or features that are not finite.
    """
    reference = run_all(before, samples.inputs) if expected is None else expected
    found = run_all(after, samples.inputs)
    if found.shape != reference.shape or not bool(found.isfinite().all()):
        what = f"of shape {tuple(found.shape)} instead of {tuple(reference.shape)}"
        if found.shape == reference.shape:
            what = "that are not finite"
        raise RuntimeError(f"The {format} file gives features {what}.")
    per_row = cosines(found, reference)
    scale = max(float(reference.abs().max()), torch.finfo(torch.float32).tiny)
    knn = _knn(reference, found, samples.labels)
    timed = samples.inputs[:_TIMED]
    ms_before, ms_after = _milliseconds((before, after), timed)
    return ParityReport(
        format=format,
        source=samples.source,
        images=len(found),
        cosine_mean=float(per_row.mean()),
        cosine_min=float(per_row.min()),
        cosine_p1=first_percentile(per_row),
        max_difference=float((found - reference).abs().max()) / scale,
        knn_before=knn[0],
        knn_after=knn[1],
        knn_queries=knn[2],
        bytes_before=sum(value.numel() * value.element_size() for value in network.state_dict().values()),
        bytes_after=size,
        ms_before=ms_before,
        ms_after=ms_after,
        timed_batch=len(timed),
        threads=torch.get_num_threads(),
        zeros=_zeros(written),
        quantized=list(quantized or []),
        left_in_float=dict(left_in_float or {}),
        tolerance=tolerance,
    )


def check_parity(report: ParityReport, *, exact: bool) -> None:
    """Raise if the features of a file are too far from those of the network.

    Args:
        report: The comparison, with its tolerance.
        exact: Whether the features themselves, and not only their directions, must agree.

    Raises:
        RuntimeError: If the first percentile of the cosines is below 1 - tolerance, the k-NN accuracy falls by more
            than the tolerance and more than one query, or, with ``exact``, a feature differs by more than the tolerance
            times the largest.
    """
    bound, reasons = report.tolerance, []
    if exact and not report.max_difference <= bound:
        reasons.append(f"features differ from those of the model by up to {report.max_difference:.2g} of the largest")
    if not 1 - report.cosine_p1 <= bound:
        reasons.append(f"the first percentile of the cosines is {report.cosine_p1:.4f}")
    if report.knn_before is not None and report.knn_after is not None:
        drop = report.knn_before - report.knn_after
        if drop > max(bound, 1.001 / report.knn_queries):
            reasons.append(f"k-NN falls from {report.knn_before:.4f} to {report.knn_after:.4f}")
    if reasons:
        raise RuntimeError(
            f"The {report.format} file is not within `tolerance` {bound:g} of the model: {'; '.join(reasons)}. "
            f"Nothing was written. Compared on {report.source}."
        )


def weight_tensors(network: nn.Module) -> list[Tensor]:
    """Return the weights of a network that have two dimensions or more: no biases, no norms."""
    return [weight for weight in network.parameters() if weight.ndim >= 2]


def _zeros(network: nn.Module) -> float:
    total = sum(weight.numel() for weight in weight_tensors(network))
    return sum(int((weight == 0).sum()) for weight in weight_tensors(network)) / max(total, 1)


def _knn(before: Tensor, after: Tensor, labels: Tensor | None) -> tuple[float | None, float | None, int]:
    """Return the k-NN accuracy of two sets of features ``(N, F)`` with labels ``(N,)``, and the number of queries."""
    if labels is None:
        return None, None, 0
    known = labels >= 0
    before, after, labels = before[known], after[known], labels[known].long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    bank, queries = order[: len(order) // 2], order[len(order) // 2 :]
    if len(bank) == 0 or bool((labels == labels[0]).all()):
        return None, None, 0
    scores = []
    for features in (before, after):
        metric = KNNAccuracy(num_classes=int(labels.max()) + 1, k=min(NEIGHBORS, len(bank)))
        metric.update_bank(features[bank], labels[bank])
        metric.update(features[queries], labels[queries])
        scores.append(float(metric.compute()))
    return scores[0], scores[1], len(queries)


def _milliseconds(runners: tuple[Runner, Runner], inputs: Tensor) -> list[float]:
    """Return the median time per image of a batch in milliseconds; the runners take turns after one call of each."""
    seconds: list[list[float]] = [[], []]
    with torch.no_grad():
        for turn in range(_ROUNDS + 1):
            for runner, times in zip(runners, seconds, strict=True):
                start = time.perf_counter()
                runner(inputs)
                if turn > 0:
                    times.append(time.perf_counter() - start)
    return [1000 * statistics.median(times) / len(inputs) for times in seconds]


def check_tolerance(tolerance: float | None, default: float) -> float:
    """Return the tolerance of a format, after checking that it is in 0..1."""
    found = default if tolerance is None else tolerance
    hint = "It is the largest fall of a cosine or of an accuracy"
    check_interval("tolerance", found, "[0, 1]", hint)
    return float(found)


def as_json(values: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as strings: what is no str as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
