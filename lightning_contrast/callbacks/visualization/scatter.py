"""Scatter plot of images at two-dimensional projections of their features."""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_choice, require
from lightning_contrast.callbacks.capture.sampling import SEED
from lightning_contrast.callbacks.reporting import picture_of
from lightning_contrast.callbacks.visualization.sample import Sample
from lightning_contrast.seeding import derived_seed, isolated

if TYPE_CHECKING:
    from PIL.Image import Image

Layout: TypeAlias = str | Callable[[Tensor], Tensor] | None

_EXTRA = "pip install 'lightning_contrast[demo]'"
_CLASSES = 20
"""Number of classes with a color of their own; all others are gray."""


def check_layout(layout: Layout) -> None:
    """Check that a layout is known and that the packages that it needs are installed.

    Args:
        layout: "pca", "tsne", a function of the features, or None for no map.

    Raises:
        ValueError: If the name is unknown.
        ModuleNotFoundError: If matplotlib, or scikit-learn for "tsne", is missing; names the extra.
    """
    if layout is None:
        return
    if not callable(layout):
        check_choice("layout", layout, ("pca", "tsne", None))
    for package, needed in (("matplotlib", True), ("sklearn", layout == "tsne")):
        if needed and find_spec(package) is None:
            raise ModuleNotFoundError(
                f"`layout={layout!r}` needs {package}, which is not installed. "
                f"Install the extra `demo` ({_EXTRA}), or set `layout=None` for no map."
            )


def project_features(features: Tensor, layout: str | Callable[[Tensor], Tensor]) -> tuple[Tensor, tuple[str, str]]:
    """Return two-dimensional coordinates of the features and labels of the two axes.

    Args:
        features: Finite features, ``(N, F)``, N >= 2; L2-normalized here.
        layout: "pca": the first two principal components, with signs such that the largest weight is positive; "tsne":
            scikit-learn's t-SNE with cosine distance and a fixed seed; or a function from ``(N, F)`` to ``(N, 2)``.

    Returns:
        Coordinates, ``(N, 2)``, and two strings.

    Raises:
        ValueError: If the function returns another shape.
    """
    rows = F.normalize(features.float(), dim=1)
    if layout == "pca":
        return _principal_components(rows)
    device = torch.device("cpu")
    with isolated(derived_seed(SEED), device):
        if callable(layout):
            points = torch.as_tensor(layout(rows)).detach().float().cpu()
        else:
            from sklearn.manifold import TSNE

            perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
            tsne = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=SEED)
            points = torch.from_numpy(tsne.fit_transform(rows.numpy()))
    require(points.shape == (len(rows), 2), "layout", f"return ({len(rows)}, 2)", tuple(points.shape), "Return (N, 2)")
    return points, ("", "")


def _principal_components(rows: Tensor) -> tuple[Tensor, tuple[str, str]]:
    centered = (rows - rows.mean(dim=0)).double()
    _, values, directions = torch.linalg.svd(centered, full_matrices=False)
    total = values.square().sum().clamp(min=1e-12)
    points = torch.zeros(len(rows), 2)
    words = ["", ""]
    for axis in range(min(2, len(values))):
        direction = directions[axis]
        direction = direction * direction[direction.abs().argmax()].sign()
        points[:, axis] = (centered @ direction).float()
        words[axis] = f"component {axis + 1}, {float(values[axis] ** 2 / total):.0%} of the variance"
    return points, (words[0], words[1])


def draw_map(sample: Sample, class_names: Sequence[str] | None, layout: Layout, title: str) -> "Image":
    """Draw the images at their projected features and, with labels, a second panel with a point for each image.

    Args:
        sample: N >= 2 images with finite features.
        class_names: Name of each class; None for numbers.
        layout: As for `project_features`, not None.
        title: Title of the figure.

    Returns:
        An image with one or two panels.
    """
    from matplotlib.figure import Figure

    assert layout is not None
    points, axis_labels = project_features(sample.features, layout)
    panels = 1 if sample.labels is None else 2
    figure = Figure(figsize=(8 * panels, 8), dpi=90)
    figure.suptitle(title, y=0.985)
    low, high = points.amin(dim=0), points.amax(dim=0)
    middle, half = (low + high) / 2, (high - low).clamp(min=1e-6) * 0.53
    left, bottom, right, top = (float(x) for x in (*(middle - half), *(middle + half)))
    for panel in range(panels):
        axes = figure.add_axes(((panel + 0.06) / panels, 0.06, 0.92 / panels, 0.89))
        if panel == 0:
            sheet = _image_sheet(sample.pictures, (points - middle) / half)
            axes.imshow(sheet, extent=(left, right, bottom, top), aspect="auto", interpolation="antialiased")
        elif sample.labels is not None:
            _class_points(axes, points, sample.labels, class_names)
        axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1], xticks=[], yticks=[])
        axes.set(xlim=(left, right), ylim=(bottom, top))
    return picture_of(figure)


def _image_sheet(pictures: Tensor, points: Tensor) -> "Image":
    """Paste thumbnails at points in -1..1 into one image, which is ten times faster than one artist for each."""
    from PIL import Image

    edge = 1280
    small = max(8, int(edge * min(0.06, 0.7 / math.sqrt(len(points)))))
    sheet = Image.new("RGB", (edge, edge), (255, 255, 255))
    corners = ((points * torch.tensor([1.0, -1.0]) + 1) / 2 * edge - small / 2).round().int().tolist()
    for picture, corner in zip(pictures, corners, strict=True):
        tile = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((small, small))
        sheet.paste(tile, tuple(corner))
    return sheet


def _class_points(axes: Any, points: Tensor, labels: Tensor, class_names: Sequence[str] | None) -> None:
    """Draw a point for each image in the color of its class."""
    from matplotlib import colormaps

    counts = labels[labels >= 0].bincount() if bool((labels >= 0).any()) else torch.zeros(0, dtype=torch.int64)
    largest = counts.argsort(descending=True, stable=True)[:_CLASSES]
    shown = sorted(int(label) for label in largest if counts[label] > 0)
    colors = colormaps["tab10" if len(shown) <= 10 else "tab20"]
    rest = ~torch.isin(labels, torch.tensor(shown, dtype=labels.dtype))
    if bool(rest.any()):
        axes.scatter(points[rest, 0], points[rest, 1], s=18, color="0.8", label="other or no label")
    for number, label in enumerate(shown):
        of_class = labels == label
        axes.scatter(
            points[of_class, 0], points[of_class, 1], s=18, color=colors(number), label=class_word(label, class_names)
        )
    if shown or bool(rest.any()):
        axes.legend(fontsize=8, loc="best", framealpha=0.7)


def class_word(label: int, class_names: Sequence[str] | None) -> str:
    """Return the name of a class; "no label" for -1."""
    if label < 0:
        return "no label"
    return str(class_names[label]) if class_names is not None and label < len(class_names) else str(label)
