"""The texts of a report: one self-contained HTML page, and Markdown in the form of a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).with_name("templates")


def page(
    found: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, Mapping[str, float]]],
    figures: Mapping[str, list[tuple[str, str]]],
) -> str:
    """Return an HTML page that needs no other file and no network.

    Args:
        found: `Report.as_dict`.
        measured: Times by part, model and name.
        figures: Captions and SVG texts by part.
    """
    return _render("page.html", found, measured, figures)


def markdown(found: Mapping[str, Any], measured: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return a model card in Markdown, with the front matter that model hubs read.

    Args:
        found: `Report.as_dict`.
        measured: Times by part, model and name.
    """
    return _render("card.md", found, measured, {})


def _render(
    template: str, found: Mapping[str, Any], measured: Mapping[str, Any], figures: Mapping[str, list[tuple[str, str]]]
) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError as error:
        hint = "pip install 'lightning_contrast[report]'"
        raise ModuleNotFoundError(f"The report needs jinja2. Install the extra: {hint}.", name="jinja2") from error

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number

    def measured_names(part: str) -> list[str]:
        return list(dict.fromkeys(name for of in measured.get(part, {}).values() for name in of))

    functions = {"metrics": metrics, "measured_names": measured_names, "notes": notes}
    found_rows = summary(found)
    return environment.get_template(template).render(
        report=found, measured=measured, figures=figures, summary=found_rows, **functions
    )


def number(value: Any) -> str:
    """Return a number for readers: three decimals for shares, two digits of small ones, fewer for large ones."""
    if value is None:
        return "\u2013"
    size = abs(value)
    if value == 0 or (value == int(value) and size >= 2):
        return f"{int(value):,}"
    if size < 0.01:
        return f"{value:.2g}"
    return f"{value:,.3f}" if size < 10 else f"{value:,.1f}"


def summary(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per part with a headline: title, name of the value, cells by model, and whose is best.

    Args:
        found: `Report.as_dict`.
    """
    rows = []
    noise = {(row["part"], row["metric"], row["a"]) for row in found["comparisons"] if row["verdict"] == "noise"}
    for name, part in found["parts"].items():
        if not part["headline"]:
            continue
        cells: dict[str, dict[str, Any]] = {}
        label = None
        for model, of in part["models"].items():
            metric = next((key for key in of["values"] if key.startswith(part["headline"])), None)
            if metric is not None:
                label = label or metric
                low, high = of["intervals"].get(metric, (None, None))
                same = (name, metric, model) in noise
                cells[model] = {"value": of["values"][metric], "low": low, "high": high, "noise": same, "best": False}
        known = [cell for cell in cells.values() if cell["value"] is not None]
        if part["higher_is_better"] is not None and len(known) > 1:
            choose = max if part["higher_is_better"] else min
            best = choose(cell["value"] for cell in known)
            tie = all(cell["value"] == best for cell in known)
            for cell in known:
                cell["best"] = cell["value"] == best and not tie
        if cells:
            rows.append({"part": name, "title": part["title"], "metric": label, "cells": cells})
    return rows


def metrics(part: Mapping[str, Any]) -> list[str]:
    """Return the names of all values of a part, in the order in which they appear."""
    return list(dict.fromkeys(name for of in part["models"].values() for name in of["values"]))


def notes(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the notes of a part, each once, with the models that have it; "" if all have it.

    Args:
        part: A part of `Report.as_dict`.
    """
    found: dict[str, list[str]] = {}
    for model, of in part["models"].items():
        for note in of["notes"]:
            found.setdefault(note, []).append(model)
    return [("" if len(of) == len(part["models"]) > 1 else ", ".join(of), note) for note, of in found.items()]
