"""Figures of a report as SVG: curves of all models, a map of the test images, confusions and neighbors."""

import base64
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
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
_MOST_TICKS = 8
_EDGE = 48  # pixels of a thumbnail, at most


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
        # Models without curves keep their place, so that a model has one color in all figures.
        lines = {model: outcomes[model].curves if model in outcomes else {} for model in report.models}
        names = list(dict.fromkeys(curve for of in lines.values() for curve in of))
        if name == "similarity":
            found[name] = [(f"CKA of the layers of {model}", layers(of)) for model, of in lines.items() if of]
        elif len(names) > 1:
            found[name] = [
                (key, curves({model: {key: of[key]} if key in of else {} for model, of in lines.items()}, part.curve))
                for key in names
            ]
        elif names:
            found[name] = [(f"{part.curve[1]} by {part.curve[0]}", curves(lines, part.curve, log_x=part.log_x))]
    makers: list[tuple[str, Callable[[Context, str], str]]] = [
        (f"Map ({layout})", partial(image_map, layout=layout)) for layout in context.options["maps"]
    ]
    pictures, failures = [], []
    for caption, make in (*makers, ("Neighbors", neighbors), ("Confusion", confusion)):
        for model in context.subjects:
            try:
                pictures.append((f"{caption} of {model}", make(context, model)))
            except Exception as error:  # noqa: BLE001  # a figure less
                failures.append((f"{caption} of {model}", " ".join(str(error).split())))
    found |= {"pictures": pictures, "failures": failures}
    if any("<use" in picture for _, picture in pictures):
        found["thumbnails"] = [("", thumbnails(context))]
    return found


def thumbnails(context: Context) -> str:
    """Return an invisible SVG with the images of the figures, once for all models."""
    images, _ = context.images(int(context.options["pictures"]))
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="0" height="0" style="position:absolute" aria-hidden="true">'
    ]
    for row, image in enumerate(images):
        source = _png(image, _EDGE)
        parts.append(
            f'<symbol id="image-{row}" viewBox="0 0 {_EDGE} {_EDGE}">'
            f'<image width="{_EDGE}" height="{_EDGE}" href="{source}"/></symbol>'
        )
    return "".join([*parts, "</svg>"])


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
    ticks = sorted({float(x) for of in lines.values() for points in of.values() for x, _ in points})
    if len(ticks) == 1:
        plot.set_xticks(ticks, [f"{ticks[0]:g}"])
    if log_x:
        plot.set_xscale("log")
        if len(ticks) <= _MOST_TICKS:
            plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            plot.set_xticks([], minor=True)
    if axes[1].startswith("share"):
        plot.set_yscale("log")
    plot.set(xlabel=axes[0], ylabel=axes[1])
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False, fontsize=8)
    return svg(figure)


def layers(rows: dict[str, list[tuple[float, float]]]) -> str:
    """Draw a table of numbers in 0..1 as colors, the first layer at the lower left.

    Args:
        rows: Points (place of the other layer, CKA) by layer, in order.
    """
    names, size = list(rows), 0.3 * len(rows)
    values = np.full((len(names), len(names)), np.nan)
    for row, points in enumerate(rows.values()):
        for place, value in points:
            values[row, int(place)] = value
    figure = _figure(size + 2.2, size + 1.2)
    plot = figure.add_subplot()
    drawn = plot.imshow(values, cmap="Blues", vmin=0, vmax=1, origin="lower")
    plot.set_xticks(range(len(names)), names, fontsize=8, rotation=90)
    plot.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(drawn, shrink=0.8)
    return svg(figure)


def image_map(context: Context, model: str, layout: str = "t-SNE") -> str:
    """Draw test images where t-SNE (scikit-learn) or UMAP (umap-learn) places their features.

    Args:
        context: The features and images.
        model: Name of the model.
        layout: A name of `LAYOUTS`.

    Raises:
        ValueError: If there are fewer than five images.
        ModuleNotFoundError: If umap-learn is missing.
    """
    images, features = context.pictures(model)
    if len(images) < 5:
        raise ValueError("A map needs five images or more.")
    places = LAYOUTS[layout](features.double().numpy(), context.seed % 2**32)
    low, high = places.min(0), places.max(0)
    places = (places - low) / np.maximum(high - low, 1e-9)
    size, thumb = 640, 32
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" role="img">']
    for row, (x, y) in enumerate(places):
        left, top = (round(float(place) * (size - thumb), 1) for place in (x, y))
        parts.append(_place(row, left, top, thumb))
    return "".join([*parts, "</svg>"])


def _tsne(features: NDArray[Any], seed: int) -> NDArray[Any]:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    tsne = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed)
    places: NDArray[Any] = tsne.fit_transform(features)
    return places


def _umap(features: NDArray[Any], seed: int) -> NDArray[Any]:
    try:
        from umap import UMAP
    except ModuleNotFoundError as error:
        hint = "pip install 'lightning_contrast[umap]'"
        raise ModuleNotFoundError(f"A map by UMAP needs umap-learn. Install the extra: {hint}.", name="umap") from error
    near = min(15, len(features) - 1)
    umap = UMAP(metric="cosine", n_neighbors=near, init="random", random_state=seed, n_jobs=1)
    threads = torch.get_num_threads()
    try:
        places: NDArray[Any] = umap.fit_transform(features)
    finally:
        torch.set_num_threads(threads)  # numba sets the number of OpenMP's threads
    return places


LAYOUTS = {"t-SNE": _tsne, "UMAP": _umap}
"""Projections of features ``(N, F)`` to places ``(N, 2)`` by name."""


def neighbors(context: Context, model: str) -> str:
    """Draw test images and their nearest other test images."""
    images, features = context.pictures(model)
    count = min(_NEIGHBORS, len(images) - 1)
    if count < 1:
        raise ValueError("Neighbors need two images or more.")
    _, found = nearest_neighbours(features, features, count + 1)
    rows = [row * len(images) // _QUERIES for row in range(min(_QUERIES, len(images)))]
    edge, gap = _EDGE, 4
    width, height = (count + 1) * (edge + gap) + 12, len(rows) * (edge + gap)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">']
    for line, row in enumerate(rows):
        others = [int(other) for other in found[row] if int(other) != row][:count]
        for place, shown in enumerate([row, *others]):
            left = place * (edge + gap) + (12 if place else 0)
            parts.append(_place(shown, left, line * (edge + gap), edge))
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
    figure = _figure(0.36 * number + 2.2, 0.36 * number + 1.0)
    plot = figure.add_subplot()
    plot.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    names: Sequence[str] = context.class_names or [str(label) for label in range(number)]
    ticks = range(number)
    plot.set_xticks(ticks, [str(label) for label in ticks], fontsize=9)
    plot.set_yticks(ticks, [f"{name} {label}" for label, name in zip(ticks, names, strict=False)], fontsize=9)
    for row in ticks:
        for column in ticks:
            share = float(shares[row, column])
            if share >= 0.05:
                color = "white" if share > 0.5 else "#333333"
                plot.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
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


def _place(row: int, left: float, top: float, edge: float) -> str:
    """Return the SVG element that shows an image of `thumbnails`."""
    return f'<use x="{left}" y="{top}" width="{edge}" height="{edge}" href="#image-{row}"/>'


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
