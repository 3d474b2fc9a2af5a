"""Curves of similarity over the strength of a change, in words and as a picture."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = list[tuple[float, float]]
"""Strengths and similarities."""
Curves = dict[str, Curve]

BLIND, SEES = 0.9, 0.5
"""Similarities at the largest strength, from which on the words are "blind to", and up to which "still sees"."""


def mean_of(curve: Curve) -> float:
    """Return the mean similarity over the strengths."""
    return sum(value for _, value in curve) / len(curve)


def in_words(last: Curves, first: Curves | None = None) -> str:
    """Tell what features have become blind to, and what they still see.

    Args:
        last: Curves by the name of the change.
        first: Those that they are compared with.
    """
    ends = sorted(((curve[-1][1], name) for name, curve in last.items()), reverse=True)
    groups = [
        ("blind to", [end for end in ends if end[0] >= BLIND]),
        ("still see", [end for end in ends if end[0] <= SEES][::-1]),
    ]
    parts = [
        f"{words} " + ", ".join(f"{name} ({value:.2f})" for value, name in group) for words, group in groups if group
    ]
    text = "the features are " + "; they ".join(parts) if parts and parts[0].startswith("blind") else ""
    text = text or ("the features " + parts[0] if parts else "the features are blind to nothing and lose nothing")
    moved = [
        (mean_of(last[name]) - mean_of(curve), name) for name, curve in (first or {}).items() if last.get(name) != curve
    ]
    if moved:
        change, name = max(moved, key=lambda item: abs(item[0]))
        text += f"; since the first measurement {name} has moved most, by {change:+.2f}"
    return text + "."


def draw_curves(curves: Mapping[str, Curves], units: Mapping[str, str], columns: int = 5) -> "Figure":
    """Draw a panel for each change, with a line for each set of curves; needs matplotlib.

    Args:
        curves: Sets of curves by the word of the legend.
        units: What the strength of each change is measured in.
        columns: Panels in a row.
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
