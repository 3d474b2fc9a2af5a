"""Turns batches into pictures that people can look at: values, channels, and rows of tiles. Needs pillow only."""

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
"""Mean and standard deviation for each channel."""

OVERSHOOT = 0.1
"""How far values may leave 0..1 before they are taken for normalised ones: bicubic resizing goes a little too far."""
PAPER: Color = (255, 255, 255)
INK: Color = (40, 40, 40)
_LINE = 14  # height of a line of Pillow's own font, in pixels


class Display:
    """Makes 8-bit colour pictures of the images of a batch.

    Args:
        channels: The three channels shown as red, green and blue, or the one shown in grey, each >= 0. None: the first
            three, or the first where there are fewer.
        mean: Per channel, in the units of images in 0..1, where images are normalised; None: not known here.
        std: As ``mean``, > 0; both or none.
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
                len(channels) in (1, 3), "channels", "name one channel or three", channels, "Give (red, green, blue)"
            )
        if (mean is None) != (std is None):
            hint = "Give both, or neither"
            fail("mean and std", "go together", (mean, std), hint)
        for value in std or ():
            check_positive("std", value)
        self.channels = channels
        self.statistics: Statistics | None = None if mean is None or std is None else (mean, std)

    def pixels(self, images: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Return images as they are shown.

        Args:
            images: (N, C, H, W), uint8 or other integers in 0..255, or float.
            statistics: Those that the images were normalised with; ``mean`` and ``std`` come before them. Without any,
                each image whose values leave 0..1 is stretched to 0..1. NaN is shown as 0.

        Returns:
            uint8 (N, 3, H, W) on the CPU.

        Raises:
            ValueError: If the statistics or ``channels`` are those of images with more channels.
        """
        count = images.shape[1]
        chosen = list(self.channels or (range(3) if count >= 3 else (0,)))
        hint = "Name channels that the images have"
        require(max(chosen) < count, "channels", f"be below {count}, the channels of the images", self.channels, hint)
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
    hint = "Give one number for each channel"
    require(len(values) in (1, count), name, f"have {count} numbers, one for each channel", list(values), hint)
    every = torch.tensor([float(value) for value in values]).expand(count)
    return every[list(chosen)].view(1, -1, 1, 1)


def statistics_of(trainer: Any, *, training: bool) -> Statistics | None:
    """Return what the policy of a `ViewAugmentation` of the Trainer normalises with, or None where it does not.

    Args:
        trainer: Its callbacks are looked through for a ``policy`` with an ``input_spec``.
        training: Whether the images are those of training, which it always makes, or of evaluation.
    """
    for callback in trainer.callbacks:
        spec = getattr(getattr(callback, "policy", None), "input_spec", None)
        if spec is not None and (training or getattr(callback, "evaluate", True)):
            known = spec["mean"] is not None and spec["std"] is not None
            return (spec["mean"], spec["std"]) if known else None
    return None


def fitted(pixels: Tensor, edge: int) -> Tensor:
    """Return pictures in squares of one size, without distortion, smaller ones enlarged by a whole number.

    Args:
        pixels: uint8 (N, 3, H, W).
        edge: Width and height of a square in pixels.

    Returns:
        uint8 (N, 3, edge, edge); what a picture does not fill is white.
    """
    longest = max(pixels.shape[-2:])
    if longest > edge:
        height, width = (max(1, round(side * edge / longest)) for side in pixels.shape[-2:])
        small = F.interpolate(pixels.float(), (height, width), mode="bilinear", antialias=True)
        pixels = small.round().clamp(0, 255).byte()
    elif longest * 2 <= edge:
        pixels = pixels.repeat_interleave(edge // longest, dim=2).repeat_interleave(edge // longest, dim=3)
    return centred(pixels, edge)


def centred(pixels: Tensor, edge: int) -> Tensor:
    """Return pictures in the middle of white squares.

    Args:
        pixels: uint8 (N, 3, H, W), neither side longer than ``edge``.
        edge: Width and height of a square in pixels.
    """
    squares = torch.full((len(pixels), 3, edge, edge), 255, dtype=torch.uint8)
    height, width = pixels.shape[-2:]
    top, left = (edge - height) // 2, (edge - width) // 2
    squares[:, :, top : top + height, left : left + width] = pixels
    return squares


class Tile(NamedTuple):
    """A picture in a grid."""

    pixels: Tensor
    """uint8 (3, edge, edge)."""
    frame: Color | None = None
    """Colour of a frame around it."""


class Row(NamedTuple):
    """A row of a grid; a tile that is None stays empty."""

    tiles: Sequence[Tile | None]
    words: str = ""
    """Written to the left of it, line by line."""
    gap: bool = False
    """Whether it begins a new group."""


def grid(rows: Sequence[Row], titles: Sequence[str], edge: int) -> "Image":
    """Draw rows of tiles.

    Args:
        rows: Those of the grid, at least one.
        titles: A word for each column.
        edge: Width and height of a tile in pixels.

    Returns:
        A picture with 4 pixels between tiles.
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
