"""What a report holds: values with intervals by part and model, and their comparison."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import check_choice
from lightning_contrast.evaluation.feature_pass.replacing import replaced
from lightning_contrast.evaluation.protocols import bootstrap_interval, mcnemar, paired_bootstrap
from lightning_contrast.metrics import wilson_interval

SIGNIFICANCE = 0.05
LOWER_IS_BETTER = ("negative log-likelihood", "Brier score", "taken for the", "lost on unseen")
"""Beginnings of the names of values per image of which the lower is better."""
_DIGITS = 6


@dataclass
class Outcome:
    """What one part measured of one model.

    Attributes:
        values: Numbers by name; None where there is none.
        intervals: 95 % intervals ``(low, high)`` of some of them.
        per_image: Tensors ``(N,)`` of the test images behind a value, for comparisons of models.
        curves: Lines ``(x, y)`` of points by name.
        notes: Sentences.
        measured: Numbers that differ from run to run, such as times; not part of the JSON.
    """

    values: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_image: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """Values of several models by the parts of a report; `lightning_contrast.evaluation.report` makes it.

    Attributes:
        models: What is known about each model, by name, in order.
        data: What is known about the data.
        parts: Title, meaning, protocol, source and headline of each part, by name, in order.
        outcomes: By part and model.
        errors: Messages of what failed, by part and model; "" is the part itself.
        reference: Name of the model that others are compared with.
        seed: Seed of all draws.
        figures: SVG texts by part, for the page.
    """

    models: dict[str, dict[str, Any]]
    data: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    outcomes: dict[str, dict[str, Outcome]]
    errors: dict[str, dict[str, str]]
    reference: str
    seed: int
    figures: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def table(self) -> list[dict[str, Any]]:
        """Return one row per value: part, metric, model, value, and low and high of its 95 % interval or None."""
        rows = []
        for part, models in self.outcomes.items():
            for model, outcome in models.items():
                for metric, value in outcome.values.items():
                    low, high = outcome.intervals.get(metric, (None, None))
                    row = {"part": part, "metric": metric, "model": model, "value": value, "low": low, "high": high}
                    rows.append(row)
        return rows

    def compare(self, a: str, b: str) -> list[dict[str, Any]]:
        """Compare two models on the same test images, wherever a part has a value per image.

        Args:
            a: Name of a model.
            b: Name of another.

        Returns:
            One row per value: part, metric, ``difference`` of the means (a - b), ``low`` and ``high`` of its 95 %
            interval and ``p`` by paired bootstrap; ``mcnemar_p`` for right and wrong answers, else None; and
            ``verdict``: the name of the model that is better, or "noise" if p >= 0.05. With many rows, some differences
            are below 0.05 by chance.

        Raises:
            ValueError: If a name is unknown.
        """
        for name in (a, b):
            check_choice("model", name, self.models)
        rows = []
        for part, models in self.outcomes.items():
            if a not in models or b not in models:
                continue
            for metric, first in models[a].per_image.items():
                second = models[b].per_image.get(metric)
                if second is None or second.shape != first.shape:
                    continue
                found: dict[str, Any] = dict(paired_bootstrap(first, second, seed=self.seed))
                binary = bool(((first == 0) | (first == 1)).all() and ((second == 0) | (second == 1)).all())
                found["mcnemar_p"] = mcnemar(first > 0, second > 0)["p"] if binary else None
                p = found["p"] if found["mcnemar_p"] is None else found["mcnemar_p"]
                better = a if (found["difference"] > 0) != metric.startswith(LOWER_IS_BETTER) else b
                verdict = better if p < SIGNIFICANCE and found["difference"] != 0 else "noise"
                rows.append({"part": part, "metric": metric, "a": a, "b": b, **found, "verdict": verdict})
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Return everything that is the same in each run with one seed, as plain values for JSON."""
        others = [name for name in self.models if name != self.reference]
        plain = {
            "models": self.models,
            "data": self.data,
            "seed": self.seed,
            "reference": self.reference,
            "parts": {
                part: {
                    **about,
                    "models": {
                        name: {
                            "values": outcome.values,
                            "intervals": {key: list(ends) for key, ends in outcome.intervals.items()},
                            "curves": {key: [list(point) for point in line] for key, line in outcome.curves.items()},
                            "notes": outcome.notes,
                        }
                        for name, outcome in self.outcomes.get(part, {}).items()
                    },
                    "errors": self.errors.get(part, {}),
                }
                for part, about in self.parts.items()
            },
            "comparisons": [row for other in others for row in self.compare(other, self.reference)],
        }
        rounded: dict[str, Any] = _rounded(plain)
        return rounded

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json``, ``report.md`` and ``report.html``, and ``measured.json`` with times.

        Args:
            folder: Folder of the files; missing ones are created.

        Returns:
            The path of the page.

        Raises:
            OSError: If it cannot be written.
        """
        from lightning_contrast.evaluation.report_card.page import markdown, page

        target = Path(folder)
        measured = {
            part: {name: outcome.measured for name, outcome in models.items() if outcome.measured}
            for part, models in self.outcomes.items()
        }
        found = self.as_dict()
        texts = {
            "report.json": json.dumps(found, indent=1) + "\n",
            "measured.json": json.dumps({part: of for part, of in measured.items() if of}, indent=1) + "\n",
            "report.md": markdown(found, measured),
            "report.html": page(found, measured, self.figures),
        }
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                with replaced(target / name) as part:
                    part.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(error.errno, f"Cannot write the report to {target}: {error.strerror or error}") from error
        return target / "report.html"


def add_mean(outcome: Outcome, name: str, values: Tensor, seed: int) -> None:
    """Add the mean of a value per image ``(N,)``, with its bootstrap interval, or Wilson's if all are right or none.

    Args:
        outcome: Gets the value.
        name: Name of the value.
        values: On the CPU; bool or floating.
        seed: Seed of the interval.
    """
    mean = outcome.values[name] = float(values.double().mean())
    constant = values.dtype == torch.bool and mean in (0.0, 1.0)  # a bootstrap would have no width
    if constant:
        low, high = wilson_interval(values.sum(), torch.tensor(len(values)))
        outcome.intervals[name] = float(low), float(high)
    else:
        outcome.intervals[name] = bootstrap_interval(values, seed=seed)
    outcome.per_image[name] = values


def packed(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as plain values and tensors ``(N,)``, for a file that is read with ``weights_only=True``."""
    return {name: getattr(outcome, name) for name in Outcome.__dataclass_fields__}


def unpacked(saved: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a file."""
    return Outcome(**{name: saved[name] for name in Outcome.__dataclass_fields__})


def _rounded(value: Any) -> Any:
    """Return plain values for JSON: numbers with six digits, and None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, Tensor):
        return _rounded(value.tolist())
    if isinstance(value, bool) or not isinstance(value, float):
        return value
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return whether the largest logit ``(N, C)`` is that of the label ``(N,)``, bool ``(N,)``, on the CPU."""
    return (logits.argmax(1) == labels).cpu().to(torch.bool)
