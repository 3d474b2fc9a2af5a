"""Similarity over perturbation strength, as a summary and as a figure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = list[tuple[float, float]]
"""Pairs of strength and similarity."""
Curves = dict[str, Curve]

INVARIANT, SENSITIVE = 0.9, 0.5
"""Features are invariant at a similarity >= 0.9 at the largest strength, and sensitive at <= 0.5."""


def mean_of(curve: Curve) -> float:
    """Return the mean similarity over strengths."""
    return sum(value for _, value in curve) / len(curve)


def summarize(last: Curves, first: Curves | None = None) -> str:
    """Return a sentence with the perturbations that features are invariant and sensitive to.

    Args:
        last: Curves by perturbation.
        first: Curves of an earlier measurement to compare with.
    """
    ends = sorted(((curve[-1][1], name) for name, curve in last.items()), reverse=True)
    groups = [
        ("invariant to", [end for end in ends if end[0] >= INVARIANT]),
        ("sensitive to", [end for end in ends if end[0] <= SENSITIVE][::-1]),
    ]
    parts = [f"{kind} " + ", ".join(f"{name} ({end:.2f})" for end, name in group) for kind, group in groups if group]
    text = "features are " + ("; ".join(parts) or "neither invariant nor sensitive to any perturbation")
    changes = [
        (mean_of(last[name]) - mean_of(curve), name) for name, curve in (first or {}).items() if last.get(name) != curve
    ]
    if changes:
        change, name = max(changes, key=lambda item: abs(item[0]))
        text += f"; largest change since the first measurement: {name} {change:+.2f}"
    return text + "."


def draw_curves(curves: Mapping[str, Curves], units: Mapping[str, str], columns: int = 5) -> "Figure":
    """Draw a panel for each perturbation, with a line for each set of curves; requires matplotlib.

    Args:
        curves: Sets of curves by legend label.
        units: Unit of the strength of each perturbation.
        columns: Maximum number of panels per row.
    """
    from matplotlib.figure import Figure

    names: Sequence[str] = list(dict.fromkeys(name for of_label in curves.values() for name in of_label))
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.1 * rows + 0.4), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes, name in zip(panels, names, strict=False):
        for label, of_label in curves.items():
            curve = of_label.get(name, [])
            axes.plot(
                [0.0, *(s for s, _ in curve)], [1.0, *(v for _, v in curve)], marker="o", markersize=3, label=label
            )
        axes.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(units.get(name, ""), fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in list(figure.axes)[len(names) :]:
        axes.set_visible(False)
    figure.axes[0].set_ylabel("similarity\n0: another image", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure
