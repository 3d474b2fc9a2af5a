"""A map of embeddings in two dimensions, as a figure."""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_choice, require
from lightning_contrast.callbacks.capture.dataloaders import SEED
from lightning_contrast.callbacks.reporting import picture_of
from lightning_contrast.callbacks.visualization.sample import Gallery
from lightning_contrast.seeding import derived_seed, isolated

if TYPE_CHECKING:
    from PIL.Image import Image

Layout: TypeAlias = str | Callable[[Tensor], Tensor] | None

_EXTRA = "pip install 'lightning_contrast[demo]'"
_CLASSES = 20
"""Classes that get a colour of their own; the others are grey."""


def check_layout(layout: Layout) -> None:
    """Check that a layout is known and that what draws it is installed.

    Args:
        layout: "pca", "tsne", a function of the features, or None for no map.

    Raises:
        ValueError: If it is not.
        ModuleNotFoundError: If matplotlib, or scikit-learn for "tsne", is missing; names the extra.
    """
    if layout is None:
        return
    if not callable(layout):
        check_choice("layout", layout, ("pca", "tsne", None))
    for package, wanted in (("matplotlib", True), ("sklearn", layout == "tsne")):
        if wanted and find_spec(package) is None:
            raise ModuleNotFoundError(
                f"`layout={layout!r}` needs {package}, which is not installed. "
                f"Install the extra `demo` ({_EXTRA}), or set `layout=None` for no map."
            )


def places_of(features: Tensor, layout: str | Callable[[Tensor], Tensor]) -> tuple[Tensor, tuple[str, str]]:
    """Return places in two dimensions, and words for the two axes.

    Args:
        features: (N, F), finite, N >= 2; L2-normalised here.
        layout: "pca": the two directions of largest variance, each turned so that its largest weight is positive;
            "tsne": scikit-learn's, cosine distance, with a seed of its own; or a function of (N, F) that gives (N, 2).

    Raises:
        ValueError: If the function gives another shape.
    """
    rows = F.normalize(features.float(), dim=1)
    if layout == "pca":
        return _principal(rows)
    device = torch.device("cpu")
    with isolated(derived_seed(SEED), device):
        if callable(layout):
            places = torch.as_tensor(layout(rows)).detach().float().cpu()
        else:
            from sklearn.manifold import TSNE

            perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
            tsne = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=SEED)
            places = torch.from_numpy(tsne.fit_transform(rows.numpy()))
    require(places.shape == (len(rows), 2), "layout", f"give ({len(rows)}, 2)", tuple(places.shape), "Return (N, 2)")
    return places, ("", "")


def _principal(rows: Tensor) -> tuple[Tensor, tuple[str, str]]:
    centred = (rows - rows.mean(dim=0)).double()
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    total = values.square().sum().clamp(min=1e-12)
    places = torch.zeros(len(rows), 2)
    words = ["", ""]
    for axis in range(min(2, len(values))):
        direction = directions[axis]
        direction = direction * direction[direction.abs().argmax()].sign()
        places[:, axis] = (centred @ direction).float()
        words[axis] = f"component {axis + 1}, {float(values[axis] ** 2 / total):.0%} of the variance"
    return places, (words[0], words[1])


def draw_map(gallery: Gallery, class_names: Sequence[str] | None, layout: Layout, title: str) -> "Image":
    """Draw the images at the places of their features, and beside it, where there are labels, the classes as points.

    Args:
        gallery: N >= 2 images with finite features.
        class_names: A word for each class; None: its number.
        layout: As for `places_of`, not None.
        title: Written above.

    Returns:
        A picture of one or two maps.
    """
    from matplotlib.figure import Figure

    assert layout is not None
    places, axes_words = places_of(gallery.features, layout)
    panels = 1 if gallery.labels is None else 2
    figure = Figure(figsize=(8 * panels, 8), dpi=90)
    figure.suptitle(title, y=0.985)
    low, high = places.amin(dim=0), places.amax(dim=0)
    middle, half = (low + high) / 2, (high - low).clamp(min=1e-6) * 0.53
    left, bottom, right, top = (float(x) for x in (*(middle - half), *(middle + half)))
    for panel in range(panels):
        axes = figure.add_axes(((panel + 0.06) / panels, 0.06, 0.92 / panels, 0.89))
        if panel == 0:
            sheet = _sheet(gallery.pictures, (places - middle) / half)
            axes.imshow(sheet, extent=(left, right, bottom, top), aspect="auto", interpolation="antialiased")
        elif gallery.labels is not None:
            _classes(axes, places, gallery.labels, class_names)
        axes.set(xlabel=axes_words[0], ylabel=axes_words[1], xticks=[], yticks=[])
        axes.set(xlim=(left, right), ylim=(bottom, top))
    return picture_of(figure)


def _sheet(pictures: Tensor, places: Tensor) -> "Image":
    """Return small pictures at places in -1..1, in one: an artist of matplotlib for each takes ten times as long."""
    from PIL import Image

    edge = 1280
    small = max(8, int(edge * min(0.06, 0.7 / math.sqrt(len(places)))))
    sheet = Image.new("RGB", (edge, edge), (255, 255, 255))
    corners = ((places * torch.tensor([1.0, -1.0]) + 1) / 2 * edge - small / 2).round().int().tolist()
    for picture, corner in zip(pictures, corners, strict=True):
        tile = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((small, small))
        sheet.paste(tile, tuple(corner))
    return sheet


def _classes(axes: Any, places: Tensor, labels: Tensor, class_names: Sequence[str] | None) -> None:
    """Draw a point for each image in the colour of its class."""
    from matplotlib import colormaps

    counts = labels[labels >= 0].bincount() if bool((labels >= 0).any()) else torch.zeros(0, dtype=torch.int64)
    largest = counts.argsort(descending=True, stable=True)[:_CLASSES]
    shown = sorted(int(label) for label in largest if counts[label] > 0)
    colors = colormaps["tab10" if len(shown) <= 10 else "tab20"]
    rest = ~torch.isin(labels, torch.tensor(shown, dtype=labels.dtype))
    if bool(rest.any()):
        axes.scatter(places[rest, 0], places[rest, 1], s=18, color="0.8", label="other or no label")
    for number, label in enumerate(shown):
        of_class = labels == label
        axes.scatter(
            places[of_class, 0], places[of_class, 1], s=18, color=colors(number), label=class_word(label, class_names)
        )
    if shown or bool(rest.any()):
        axes.legend(fontsize=8, loc="best", framealpha=0.7)


def class_word(label: int, class_names: Sequence[str] | None) -> str:
    """Return what a class is called; of -1, "no label"."""
    if label < 0:
        return "no label"
    return str(class_names[label]) if class_names is not None and label < len(class_names) else str(label)
