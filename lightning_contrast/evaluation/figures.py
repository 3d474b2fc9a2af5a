"""Figures of views, nearest neighbors and image maps. Needs matplotlib."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def image_grid(rows: Sequence[Sequence[Tensor]], titles: Sequence[str], gap_every: int = 0) -> "Figure":
    """Draw rows of images with column titles.

    Args:
        rows: Rows of images, each (C, H, W), uint8 or float in 0..1.
        titles: One title per column.
        gap_every: Number of columns per group, with a gap before each group after the first column; 0 for none.
    """
    gaps = [0.35 if gap_every and column % gap_every == 1 else 0.0 for column in range(len(titles))]
    width = len(titles) + sum(gaps)
    figure = _figure(width * 0.8, len(rows) * 0.8 + 0.5)
    top = 1 - 0.5 / (len(rows) * 0.8 + 0.5)
    for i, row in enumerate(rows):
        left = 0.0
        for j, image in enumerate(row):
            left += gaps[j] / width
            axes = figure.add_axes((left, top * (1 - (i + 1) / len(rows)), 0.95 / width, 0.95 * top / len(rows)))
            left += 1 / width
            _show(axes, image, titles[j] if i == 0 else "")
    return figure


def view_grid(
    images: Tensor,
    views: Sequence[Tensor],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> "Figure":
    """Draw one row per image: the original and its views.

    Args:
        images: (N, C, H, W), uint8 or float in 0..1.
        views: V tensors (N, C, h, w).
        mean: Mean per channel if the views are normalized.
        std: Standard deviation per channel if the views are normalized.

    Returns:
        A figure of N rows and 1 + V columns.
    """
    views = [_without_statistics(view, mean, std) for view in views]
    rows = [[images[i], *(view[i] for view in views)] for i in range(len(images))]
    titles = ["original", *(f"view {v + 1}" for v in range(len(views)))]
    return image_grid(rows, titles)


def reconstruction_grid(
    images: Tensor,
    filled: Tensor,
    mask: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> "Figure":
    """Draw one row per image: the image, what a method of masked prediction saw of it, and what it made of that.

    Args:
        images: Images as the method got them, (N, C, H, W), with square patches.
        filled: The same with predictions in the hidden patches, (N, C, H, W), as ``MAE.reconstruct`` returns them.
        mask: (N, patches) bool, True where hidden; hidden patches are drawn in gray.
        mean: Mean per channel if the images are normalized.
        std: Standard deviation per channel if the images are normalized.

    Returns:
        A figure of N rows and 3 columns.

    Raises:
        ValueError: If the images differ in shape, or the mask is not one of square patches.

    Example:
        >>> figure = reconstruction_grid(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), torch.rand(2, 4) > 0.5)
        >>> len(figure.axes)
        6
    """
    hint = "Give the images, and both results of `reconstruct`"
    require(images.shape == filled.shape, "filled", "have the shape of the images", tuple(filled.shape), hint)
    height, width = images.shape[2:]
    size = math.isqrt(height * width // max(1, mask.shape[-1]))
    fits = mask.ndim == 2 and len(mask) == len(images) and size > 0 and height % size == width % size == 0
    fits = fits and mask.shape[1] == height * width // size**2
    require(fits, "mask", f"be ({len(images)}, patches) of square patches", tuple(mask.shape), hint)
    pixels = mask.view(len(mask), 1, height // size, width // size)
    pixels = pixels.repeat_interleave(size, 2).repeat_interleave(size, 3)
    images, filled = (_without_statistics(part, mean, std) for part in (images, filled))
    seen = torch.where(pixels, 0.5, images)
    return image_grid(list(zip(images, seen, filled, strict=True)), ["image", "visible", "filled"])


def neighbour_strips(
    queries: Tensor, gallery: Tensor, features: Sequence[tuple[str, Tensor, Tensor]], *, count: int = 5
) -> "Figure":
    """Draw one row per query: the query and its nearest gallery images in each feature space.

    Args:
        queries: Images (N, C, H, W).
        gallery: Images (M, C, H, W).
        features: Title, query features (N, F) and gallery features (M, F) of each feature space.
        count: Number of neighbors per space, in order of cosine similarity.

    Returns:
        A figure of N rows.
    """
    require(len(features) > 0, "features", "name at least one feature space", len(features), "Give (title, q, g)")
    rows = [[query] for query in queries]
    titles = ["query"]
    for title, of_queries, of_gallery in features:
        similarity = F.normalize(of_queries, dim=1) @ F.normalize(of_gallery, dim=1).T
        for row, nearest in zip(rows, similarity.topk(count, dim=1).indices, strict=True):
            row.extend(gallery[nearest])
        titles += [f"{title}:\nnearest", *(str(n + 2) for n in range(count - 1))]
    return image_grid(rows, titles, gap_every=count)


def caption_strips(images: Tensor, captions: Sequence[str], similarity: Tensor, queries: Sequence[int]) -> "Figure":
    """Draw one row per pair: the caption, its 5 most similar images, the image, and its 3 most similar captions.

    The counterpart is marked by a green frame among the images and by green letters among the captions.

    Args:
        images: (N, C, H, W), uint8 or float in 0..1.
        captions: N texts; text i belongs to image i.
        similarity: Similarity of text i and image j, (N, N).
        queries: Rows of the pairs to draw.

    Returns:
        A figure with one row per query.
    """
    rows, fits = len(queries), similarity.shape == (len(images), len(captions)) == (len(captions), len(images))
    hint = "Give the similarity of all texts (rows) and all images (columns)"
    require(fits, "similarity", "have one row per text and one column per image", tuple(similarity.shape), hint)
    figure = _figure(11, 0.85 * rows + 0.3)
    for row, query in enumerate(queries):
        bottom, height = (rows - row - 0.8) / (rows + 0.4), 0.9 / (rows + 0.4)
        figure.text(0.005, bottom + height / 2, f"“{captions[query]}” →", fontsize=8, va="center")
        found = similarity[query].topk(5).indices.tolist()
        for place, image in enumerate([*found, query]):
            left = 0.24 + 0.075 * place + (0.02 if place == 5 else 0)
            axes = figure.add_axes((left, bottom, 0.07, height))
            axes.imshow(_pixels(images[image]), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            hit = image == query and place < 5
            for spine in axes.spines.values():
                spine.set(visible=hit, color="green", linewidth=3)
        for place, text in enumerate(similarity[:, query].topk(3).indices.tolist()):
            height_of_line = bottom + height * (0.8 - 0.3 * place)
            color = "green" if text == query else "black"
            figure.text(0.73, height_of_line, f"→ {captions[text]}", fontsize=8, va="center", color=color)
    return figure


def image_map(images: Tensor, features: Tensor, *, size: float = 10.0, seed: int = 0) -> "Figure":
    """Draw every image at the t-SNE coordinates of its features (scikit-learn, cosine distance).

    Args:
        images: (N, C, H, W), uint8 or float in 0..1.
        features: (N, F).
        size: Edge of the figure in inches.
        seed: Seed of t-SNE.

    Returns:
        A figure with N thumbnails.
    """
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(images) - 1) / 3)
    tsne = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed)
    places = tsne.fit_transform(features.numpy())
    figure = _figure(size, size)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(places[:, 0].min() - 2, places[:, 0].max() + 2)
    axes.set_ylim(places[:, 1].min() - 2, places[:, 1].max() + 2)
    for image, place in zip(images, places, strict=True):
        picture = OffsetImage(_pixels(image), zoom=0.7)
        axes.add_artist(AnnotationBbox(picture, tuple(place), frameon=False))
    return figure


def _without_statistics(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Return images (N, C, H, W) with their normalization undone, if there was one."""
    if mean is None or std is None:
        return images
    scale, shift = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (std, mean))
    return images * scale + shift


def _show(axes: "Axes", image: Tensor, title: str) -> None:
    axes.imshow(_pixels(image), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=8)


def _figure(width: float, height: float) -> "Figure":
    """Return a figure without a window system or global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110)


def _pixels(image: Tensor) -> NDArray[np.float32]:
    """Return an image (C, H, W) as an array (H, W, 3) in 0..1."""
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    pixels = pixels.clamp(0, 1).expand(3, -1, -1) if len(pixels) == 1 else pixels.clamp(0, 1)
    return np.asarray(pixels.permute(1, 2, 0).cpu(), dtype=np.float32)
