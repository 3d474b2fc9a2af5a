"""Conversion of batches to 8-bit RGB pictures, and grids of pictures. Requires pillow only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_positive, fail, require

if TYPE_CHECKING:
    from PIL.Image import Image

Color = tuple[int, int, int]
Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel."""

OVERSHOOT = 0.1
"""Values may exceed 0..1 by this much, as after bicubic resizing, without being considered normalized."""
PAPER: Color = (255, 255, 255)
INK: Color = (40, 40, 40)
_LINE = 14  # line height of Pillow's default font, in pixels


class Display:
    """Conversion of the images of a batch to 8-bit RGB pictures.

    Args:
        channels: Indices of the three channels shown as red, green and blue, or of one channel shown in gray, >= 0.
            None: the first three, or the first if there are fewer.
        mean: Mean of each channel used for normalization, for images in 0..1; None if unknown.
        std: Standard deviation of each channel, > 0; given together with ``mean``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        channels: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if channels is not None:
            for channel in channels:
                check_at_least("channels", channel, 0)
            require(
                len(channels) in (1, 3), "channels", "have one or three entries", channels, "Give (red, green, blue)"
            )
        if (mean is None) != (std is None):
            hint = "Give both, or neither"
            fail("mean", "be given with `std`", (mean, std), hint)
        for value in std or ():
            check_positive("std", value)
        self.channels = channels
        self.statistics: Statistics | None = None if mean is None or std is None else (mean, std)

    def pixels(self, images: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Return images as 8-bit RGB pictures; NaN becomes 0.

        Args:
            images: Integers in 0..255 or float, ``(N, C, H, W)``.
            statistics: Mean and std used for normalization; ``mean`` and ``std`` of the constructor take precedence.
                Without any, each image whose values exceed 0..1 is rescaled to 0..1.

        Returns:
            Pictures on the CPU, uint8, ``(N, 3, H, W)``.

        Raises:
            ValueError: If the statistics or ``channels`` do not fit the number of channels.
        """
        count = images.shape[1]
        chosen = list(self.channels or (range(3) if count >= 3 else (0,)))
        hint = "Give indices of existing channels"
        require(
            max(chosen) < count, "channels", f"be < {count}, the number of channels of the images", self.channels, hint
        )
        shown = images.detach()[:, chosen].cpu()
        if not shown.is_floating_point():
            shown = shown.float() / (1 if shown.dtype == torch.bool else 255)
        shown = shown.float()
        statistics = self.statistics or statistics
        if statistics is not None:
            mean, std = (
                _per_channel(name, s, count, chosen) for name, s in zip(("mean", "std"), statistics, strict=True)
            )
            shown = shown * std + mean
        shown = shown.nan_to_num(0.0, 1.0, 0.0)
        if statistics is None and shown.numel() > 0:
            low, high = shown.amin(dim=(1, 2, 3), keepdim=True), shown.amax(dim=(1, 2, 3), keepdim=True)
            outside = (low < -OVERSHOOT) | (high > 1 + OVERSHOOT)
            shown = torch.where(outside, (shown - low) / (high - low).clamp(min=1e-12), shown)
        return (shown.clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1).contiguous()


def _per_channel(name: str, values: Sequence[float], count: int, chosen: Sequence[int]) -> Tensor:
    hint = "Give one number per channel"
    require(len(values) in (1, count), name, f"have {count} numbers, one per channel", list(values), hint)
    every = torch.tensor([float(value) for value in values]).expand(count)
    return every[list(chosen)].view(1, -1, 1, 1)


def statistics_of(trainer: Any, *, training: bool) -> Statistics | None:
    """Return the normalization statistics of the Trainer's `ViewAugmentation`, None if there are none.

    Args:
        trainer: Trainer whose callbacks are searched for a ``policy`` with an ``input_spec``.
        training: Whether the images are training views, else evaluation images.
    """
    for callback in trainer.callbacks:
        spec = getattr(getattr(callback, "policy", None), "input_spec", None)
        if spec is not None and (training or getattr(callback, "evaluate", True)):
            known = spec["mean"] is not None and spec["std"] is not None
            return (spec["mean"], spec["std"]) if known else None
    return None


def fit_squares(pixels: Tensor, edge: int) -> Tensor:
    """Fit pictures into squares: large ones are downsampled, small ones enlarged by an integer factor.

    Args:
        pixels: Pictures, uint8, ``(N, 3, H, W)``.
        edge: Width and height of a square in pixels.

    Returns:
        Squares with the original aspect ratio on white, uint8, ``(N, 3, edge, edge)``.
    """
    longest = max(pixels.shape[-2:])
    if longest > edge:
        height, width = (max(1, round(side * edge / longest)) for side in pixels.shape[-2:])
        small = F.interpolate(pixels.float(), (height, width), mode="bilinear", antialias=True)
        pixels = small.round().clamp(0, 255).byte()
    elif longest * 2 <= edge:
        pixels = pixels.repeat_interleave(edge // longest, dim=2).repeat_interleave(edge // longest, dim=3)
    return centered(pixels, edge)


def centered(pixels: Tensor, edge: int) -> Tensor:
    """Center pictures on white squares.

    Args:
        pixels: Pictures, uint8, ``(N, 3, H, W)``, with H and W <= ``edge``.
        edge: Width and height of a square in pixels.

    Returns:
        Squares, uint8, ``(N, 3, edge, edge)``.
    """
    squares = torch.full((len(pixels), 3, edge, edge), 255, dtype=torch.uint8)
    height, width = pixels.shape[-2:]
    top, left = (edge - height) // 2, (edge - width) // 2
    squares[:, :, top : top + height, left : left + width] = pixels
    return squares


class Tile(NamedTuple):
    """Picture in a grid."""

    pixels: Tensor
    """RGB values, uint8, ``(3, edge, edge)``."""
    frame: Color | None = None
    """Color of a frame around the picture."""


class Row(NamedTuple):
    """Row of a grid; tiles that are None stay empty."""

    tiles: Sequence[Tile | None]
    words: str = ""
    """Text to the left of the row."""
    gap: bool = False
    """Whether the row starts a new group."""


def grid(rows: Sequence[Row], titles: Sequence[str], edge: int) -> "Image":
    """Draw a grid of tiles with 4 pixels between them.

    Args:
        rows: Rows of the grid, at least one.
        titles: Title of each column.
        edge: Width and height of a tile in pixels.

    Returns:
        An RGB image.
    """
    from PIL import Image, ImageDraw

    between, step = 4, edge + 4
    margin = max((len(line) for row in rows for line in row.words.splitlines()), default=0) * 7
    margin += between if margin else 0
    height = _LINE + 2 + sum(step + (2 * between if row.gap else 0) for row in rows)
    picture = Image.new("RGB", (margin + step * len(titles) + between, height + between), PAPER)
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(titles):
        draw.text((margin + between + column * step, 2), title, fill=INK)
    top = _LINE + 2
    for row in rows:
        top += 2 * between if row.gap else 0
        draw.multiline_text((between, top + 2), row.words, fill=INK)
        for column, tile in enumerate(row.tiles):
            if tile is None:
                continue
            left = margin + between + column * step
            if tile.frame is not None:
                box = (left - 2, top - 2, left + edge + 1, top + edge + 1)
                draw.rectangle(box, fill=tile.frame)
            picture.paste(Image.fromarray(tile.pixels.permute(1, 2, 0).numpy()), (left, top))
        top += step
    return picture
