"""Made-up images of the domains of `augment.domains`: each function draws (count, C, 96, 96) with torch's generator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import augment

EDGE = 96
Y, X = torch.meshgrid(torch.linspace(-1, 1, EDGE), torch.linspace(-1, 1, EDGE), indexing="ij")


def smooth(count: int, cells: int, channels: int = 1, mode: str = "bicubic") -> Tensor:
    """Return noise in 0..1 with a given number of cells along each axis, (count, channels, 96, 96)."""
    return F.interpolate(torch.rand(count, channels, cells, cells), (EDGE, EDGE), mode=mode).clamp(0, 1)


def ellipses(places: Tensor, height: float, width: float, sharp: float = 20.0) -> Tensor:
    """Return a mask of ellipses around places (..., 2), row and column in -1..1: (..., 96, 96) in 0..1."""
    row, column = places[..., 0, None, None], places[..., 1, None, None]
    return torch.sigmoid(sharp * (1 - (((Y - row) / height) ** 2 + ((X - column) / width) ** 2).sqrt()))


def tiles(count: int) -> Tensor:
    """Stained tissue: nuclei in hematoxylin, the rest in eosin; RGB."""
    nuclei = ellipses(2 * torch.rand(count, 40, 2) - 1, 0.08, 0.06).amax(1)
    eosin = 0.02 + 0.07 * smooth(count, 6)[:, 0]
    stains = torch.stack([0.11 * nuclei + 0.01, eosin, torch.zeros_like(eosin)], 1)
    return augment.hed_to_rgb(stains)


def fields(count: int) -> Tensor:
    """Parcels of land in four bands, 16 bits: blue, green, red and a near infrared that is high where plants grow."""
    plants, soil = smooth(count, 7, mode="nearest"), 0.3 + 0.2 * smooth(count, 24)
    bands = [0.06 + 0.05 * soil, 0.1 + 0.06 * plants, 0.28 * soil - 0.06 * plants + 0.05, 0.12 + 0.4 * plants]
    return (torch.cat(bands, 1) * 10_000).round().to(torch.int16)


def chests(count: int) -> Tensor:
    """X-rays with the heart at the right of the image and a mark on that side; one channel."""
    at = lambda row, column: torch.tensor([row, column]) + 0.04 * torch.randn(count, 2)  # noqa: E731
    lungs = torch.maximum(ellipses(at(0.0, -0.4), 0.7, 0.32), ellipses(at(0.0, 0.4), 0.7, 0.32))
    image = 0.75 * ellipses(at(0.3, 0.0), 1.3, 0.95) - 0.45 * lungs + 0.35 * ellipses(at(0.25, 0.2), 0.35, 0.3)
    image = image + 0.08 * (torch.cos(14 * Y + 2 * X**2) * lungs) + 0.05 * smooth(count, 30)[:, 0]
    image[:, 6:16, 82:88] = 1.0
    return image.clamp(0, 1)[:, None]


def slices(count: int) -> Tensor:
    """CT in Hounsfield units: air, lungs, soft tissue with small differences, and bone; 16 bits, one channel."""
    center, up = torch.zeros(count, 2), torch.tensor([[0.55, 0.0]]).expand(count, -1)
    body, organ = ellipses(center, 0.75, 0.95), ellipses(torch.tensor([[0.1, -0.5]]).expand(count, -1), 0.4, 0.35)
    lung = ellipses(torch.tensor([[-0.1, 0.45]]).expand(count, -1), 0.4, 0.3)
    units = -1000 + 1020 * body + 60 * organ + 60 * smooth(count, 12)[:, 0] * body - 800 * lung
    return (units + 700 * ellipses(up, 0.13, 0.13)).round().to(torch.int16)[:, None]


def brains(count: int) -> Tensor:
    """MRI of a head: skull, gray and white matter, two ventricles; one channel."""
    at = lambda row, column: torch.tensor([row, column]) + 0.02 * torch.randn(count, 2)  # noqa: E731
    head, inside, white = (ellipses(at(0.0, 0.0), size, 0.8 * size) for size in (0.95, 0.82, 0.7))
    ventricles = torch.maximum(ellipses(at(0.0, -0.12), 0.28, 0.07), ellipses(at(0.0, 0.12), 0.28, 0.07))
    folds = smooth(count, 14)[:, 0] * (inside - 0.6 * white)
    return (0.7 * head - 0.3 * inside + 0.25 * white - 0.4 * ventricles + 0.2 * folds).clamp(0, 1)[:, None]


def cells(count: int) -> Tensor:
    """Fluorescence in five channels: nuclei, cell bodies and three kinds of texture."""
    places = 2 * torch.rand(count, 12, 2) - 1
    nuclei, bodies = ellipses(places, 0.1, 0.1).amax(1), ellipses(places, 0.24, 0.24, 8.0).amax(1)
    return torch.cat([nuclei[:, None], 0.8 * bodies[:, None], bodies[:, None] * smooth(count, 30, 3)], 1)


def plates(count: int) -> Tensor:
    """Brushed metal with four holes; RGB."""
    brushed = F.interpolate(torch.rand(count, 1, EDGE, 3), (EDGE, EDGE), mode="bicubic")
    holes = ellipses(torch.tensor([[r, c] for r in (-0.6, 0.6) for c in (-0.6, 0.6)]), 0.18, 0.18, 40.0).amax(0)
    return ((0.5 + 0.12 * brushed) * (1 - 0.8 * holes) * torch.tensor([0.95, 1.0, 1.05]).view(3, 1, 1)).clamp(0, 1)
