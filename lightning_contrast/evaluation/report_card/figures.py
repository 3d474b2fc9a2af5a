"""Figures of a report as SVG: curves of all models, a map of the test images, confusions and neighbors."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast.augment.images import as_float
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.parts import PARTS
from lightning_contrast.evaluation.report_card.result import Report
from lightning_contrast.metrics import nearest_neighbours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#2a7bd1", "#d9622b", "#3a9a5b", "#a355c9", "#b8912a", "#5b6b7a")
_QUERIES, _NEIGHBORS = 8, 6
_MOST_CLASSES = 30


def draw(report: Report, context: Context) -> dict[str, list[tuple[str, str]]]:
    """Return figures as (caption, SVG) by part; "pictures" has those of the images.

    Args:
        report: The values.
        context: The features and images.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for name, outcomes in report.outcomes.items():
        part = PARTS.get(name)
        if part is None or not part.curve[0]:
            continue
        lines = {model: outcome.curves for model, outcome in outcomes.items() if outcome.curves}
        if lines:
            found[name] = [(f"{part.curve[1]} by {part.curve[0]}", curves(lines, part.curve, log_x=part.log_x))]
    pictures = []
    for model in context.subjects:
        for caption, make in (("Map (t-SNE)", image_map), ("Neighbors", neighbors), ("Confusion", confusion)):
            try:
                pictures.append((f"{caption} of {model}", make(context, model)))
            except (ValueError, TypeError, RuntimeError) as error:
                report.errors.setdefault("pictures", {})[f"{model}, {caption.lower()}"] = " ".join(str(error).split())
    found["pictures"] = pictures
    return found


def curves(
    lines: dict[str, dict[str, list[tuple[float, float]]]], axes: tuple[str, str], *, log_x: bool = False
) -> str:
    """Draw one line per model and curve.

    Args:
        lines: Points by model and name.
        axes: Labels of x and y.
        log_x: Whether x is logarithmic.
    """
    figure = _figure(5.6, 3.4)
    plot = figure.add_subplot()
    discrete = axes[0] == "class"
    for place, (model, of) in enumerate(lines.items()):
        color = COLORS[place % len(COLORS)]
        for points in of.values():
            x, y = zip(*points, strict=True)
            style = "none" if discrete else "-"
            plot.plot(x, y, color=color, marker="o", markersize=4, label=model, linestyle=style)
            model = f"_{model}"  # one entry of the legend per model  # noqa: PLW2901
    if log_x:
        plot.set_xscale("log")
    if axes[1].startswith("share"):
        plot.set_yscale("log")
    plot.set(xlabel=axes[0], ylabel=axes[1])
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False, fontsize=8)
    return svg(figure)


def image_map(context: Context, model: str) -> str:
    """Draw test images at the t-SNE coordinates of their features (scikit-learn)."""
    from sklearn.manifold import TSNE

    images, features = context.pictures(model)
    if len(images) < 5:
        raise ValueError("A map needs five images or more.")
    perplexity = min(30.0, (len(images) - 1) / 3)
    tsne = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=context.seed % 2**32)
    places = tsne.fit_transform(features.double().numpy())
    low, high = places.min(0), places.max(0)
    places = (places - low) / np.maximum(high - low, 1e-9)
    size, thumb = 640, 24
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" role="img">']
    for image, (x, y) in zip(images, places, strict=True):
        left, top = (round(float(place) * (size - thumb), 1) for place in (x, y))
        source = _png(image, 32)
        parts.append(f'<image x="{left}" y="{top}" width="{thumb}" height="{thumb}" href="{source}"/>')
    return "".join([*parts, "</svg>"])


def neighbors(context: Context, model: str) -> str:
    """Draw test images and their nearest other test images."""
    images, features = context.pictures(model)
    count = min(_NEIGHBORS, len(images) - 1)
    if count < 1:
        raise ValueError("Neighbors need two images or more.")
    _, found = nearest_neighbours(features, features, count + 1)
    rows = [row * len(images) // _QUERIES for row in range(min(_QUERIES, len(images)))]
    edge, gap = 48, 4
    width, height = (count + 1) * (edge + gap) + 12, len(rows) * (edge + gap)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">']
    for line, row in enumerate(rows):
        others = [int(other) for other in found[row] if int(other) != row][:count]
        for place, shown in enumerate([row, *others]):
            left = place * (edge + gap) + (12 if place else 0)
            source = _png(images[shown], 48)
            parts.append(
                f'<image x="{left}" y="{line * (edge + gap)}" width="{edge}" height="{edge}" href="{source}"/>'
            )
    return "".join([*parts, "</svg>"])


def confusion(context: Context, model: str) -> str:
    """Draw how often each class is taken for each, by logistic regression."""
    given = context.labeled(model)
    number = given.num_classes
    if number > _MOST_CLASSES:
        raise ValueError(f"A confusion matrix is drawn for {_MOST_CLASSES} classes at most, there are {number}.")
    found = context.classifier(model)
    counts = torch.zeros(number, number)
    ones = torch.ones(len(found.labels))
    counts.index_put_((found.labels.cpu(), found.logits.argmax(1).cpu()), ones, accumulate=True)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = _figure(0.5 * number + 2.6, 0.42 * number + 1.6)
    plot = figure.add_subplot()
    plot.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    names: Sequence[str] = context.class_names or [str(label) for label in range(number)]
    ticks = range(number)
    plot.set_xticks(ticks, [str(label) for label in ticks], fontsize=7)
    plot.set_yticks(ticks, [f"{name} {label}" for label, name in zip(ticks, names, strict=False)], fontsize=7)
    for row in ticks:
        for column in ticks:
            share = float(shares[row, column])
            if share >= 0.05:
                color = "white" if share > 0.5 else "#333333"
                plot.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=color)
    plot.set(xlabel="predicted", ylabel="")
    return svg(figure)


def svg(figure: "Figure") -> str:
    """Return a figure as SVG text without a date, in which black follows the color of the page's text."""
    from matplotlib import rc_context

    memory = io.StringIO()
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure.savefig(memory, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = memory.getvalue()
    text = text[text.index("<svg") :]
    return text.replace("#000000", "currentColor").replace("fill: black", "fill: currentColor")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _png(image: Tensor, edge: int) -> str:
    """Return an image ``(C, H, W)`` as a data address, at most ``edge`` pixels large."""
    from PIL import Image

    pixels = as_float(image.unsqueeze(0))
    if max(pixels.shape[-2:]) > edge:
        scale = edge / max(pixels.shape[-2:])
        size = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    array: Any = (pixels[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array[..., :3])
    memory = io.BytesIO()
    picture.save(memory, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(memory.getvalue()).decode()
