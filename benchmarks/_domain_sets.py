"""Small generated image sets of five domains, in which the label and the nuisances are those of the domain.

An image is a function of (set, seed, split, index) alone; the label of index i is i modulo the number of classes, so
that classes are balanced. Sets with sites (hospitals, plates) have other sites in the test split than in the training
split. docs/domains_compared.md describes each set.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from lightning_contrast.augment.images import rescale
from lightning_contrast.data import InMemoryDataModule

EDGE = 48
Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, np.random.Generator], Array]
Y, X = np.mgrid[:EDGE, :EDGE].astype(float)


@dataclass(frozen=True)
class DomainSet:
    """One set: its classes, how an image is stored and how it is drawn.

    Attributes:
        classes: Names of the labels.
        channels: Channels of the images.
        draw: From (generator of the image, label, generator of its site) to pixels (C, 48, 48) in 0..1.
        white: Integer that stands for 1; 255 is stored as uint8, larger ones as int16.
        sites: Sites of the training split and of the test split.
        parts: Coarser questions: their name, and the answer for each label, -1 where there is none.
    """

    classes: tuple[str, ...]
    channels: int
    draw: Draw
    white: int = 255
    sites: tuple[int, int] = (1, 1)
    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def scale(self) -> tuple[float, float] | None:
        """The `scale=` that a policy needs for the images, None for uint8."""
        return None if self.white == 255 else (0.0, float(self.white))


def draw_image(name: str, seed: int, split: str, index: int) -> tuple[NDArray[Any], int]:
    """Return an image (C, 48, 48) as stored, and its label.

    Args:
        name: One of `SETS`.
        seed: Seed of the set, >= 0.
        split: "train", "val" or "test"; the last two are one.
        index: Position in the split, >= 0.
    """
    domain, key, test = SETS[name], zlib.crc32(name.encode()), int(split != "train")
    label, turn = index % len(domain.classes), index // len(domain.classes)
    site = turn % domain.sites[test] + test * domain.sites[0]
    rng = np.random.default_rng([key, seed, 0, test, index])
    pixels = domain.draw(rng, label, np.random.default_rng([key, seed, 1, site]))
    dtype = np.uint8 if domain.white == 255 else np.int16
    return np.rint(pixels.clip(0, 1) * domain.white).astype(dtype), label


@lru_cache(maxsize=4)
def draw_split(name: str, seed: int, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Return images (N, C, 48, 48) of a split as stored, and labels (N,) int64; see `draw_image`."""
    images, labels = zip(*(draw_image(name, seed, split, index) for index in range(count)), strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


class DomainImages(InMemoryDataModule):
    """Data module of a generated set.

    Args:
        name: One of `SETS`.
        seed: Seed of the set and of the training order.
        train: Training images.
        test: Images of the other splits.
        batch_size: Images per batch.
        unit: Yield float32 in 0..1 instead of integers, for policies without ``scale=``.
    """

    def __init__(
        self,
        name: str,
        seed: int = 0,
        *,
        train: int = 2000,
        test: int = 1000,
        batch_size: int = 128,
        unit: bool = False,
    ) -> None:
        super().__init__(batch_size, seed=seed)
        self.name, self.counts, self.unit = name, {"train": train, "val": test, "test": test}, unit
        self.num_classes = len(SETS[name].classes)

    def read(self, split: str) -> tuple[Tensor, Tensor]:
        """Draw a split: images (N, C, 48, 48) and labels (N,) int64."""
        images, labels = draw_split(self.name, self.seed, split, self.counts[split])
        return (rescale(images, (0.0, float(SETS[self.name].white))) if self.unit else images), labels


# ------------------------------------------------------------------------------------------------ shapes


def ellipse(center: Any, radii: Any, angle: float = 0.0, edge: float = 0.5) -> Array:
    """Return a filled ellipse (48, 48) in 0..1 with a soft edge of ``edge`` pixels."""
    dy, dx = Y - center[0], X - center[1]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    distance = (np.hypot(along / radii[0], across / radii[1]) - 1) * min(radii)
    return 1 / (1 + np.exp((distance / edge).clip(-30, 30)))


def spot(center: Any, sigma: float) -> Array:
    """Return a Gaussian spot (48, 48) of height 1."""
    return spots(np.array([center]), np.array([sigma]), np.ones(1))


def spots(points: Array, sigmas: Array, heights: Array) -> Array:
    """Return the sum (48, 48) of Gaussian spots at points (N, 2), with deviations and heights (N,)."""
    rows, columns = np.exp(-((np.arange(EDGE)[:, None, None] - points) ** 2) / (2 * sigmas[:, None] ** 2)).transpose(
        2, 0, 1
    )
    return (rows * heights) @ columns.T


def cloudy(rng: np.random.Generator, sigma: Any) -> Array:
    """Return smooth noise (48, 48) with mean 0 and deviation 1."""
    noise = gaussian_filter(rng.standard_normal((EDGE, EDGE)), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def apart(rng: np.random.Generator, count: int, distance: float, tries: int = 20) -> list[Array]:
    """Return up to ``count`` points in the image (y, x), none closer than ``distance`` to another."""
    points: list[Array] = []
    for _ in range(count * tries):
        point = rng.uniform(0, EDGE, 2)
        if all(np.hypot(*(point - other)) >= distance for other in points):
            points.append(point)
        if len(points) == count:
            break
    return points


# ------------------------------------------------------------------------------------------------ histology

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])  # hematoxylin and eosin, optical density of R, G, B


def draw_tissue(rng: np.random.Generator, label: int, site: np.random.Generator) -> Array:
    """Return a tile at about 1.5 micrometers per pixel: 0 stroma, 1 gland, 2 lymphocytes, 3 tumor.

    The class is the size, number, shape and arrangement of the nuclei. A site has its stain vectors, amounts and white.
    """
    nuclei, eosin = np.zeros((EDGE, EDGE)), 0.45 + 0.08 * cloudy(rng, 3)
    lumen, angle = np.zeros((EDGE, EDGE)), rng.uniform(0, np.pi)

    def add(center: Any, radii: Any, turn: float, amount: float) -> None:
        np.maximum(nuclei, amount * rng.uniform(0.8, 1.2) * ellipse(center, radii, turn), out=nuclei)

    if label == 0:
        waves = np.sin((Y * np.cos(angle) - X * np.sin(angle)) * rng.uniform(0.9, 1.4) + cloudy(rng, 5))
        eosin += 0.1 * waves
        for center in apart(rng, rng.integers(8, 15), 6):
            add(center, (rng.uniform(4, 6), rng.uniform(1.1, 1.6)), angle + rng.normal(0, 0.2), 0.9)
    elif label == 1:
        center, radius = rng.uniform(16, 32, 2), rng.uniform(10, 15)
        lumen = ellipse(center, (radius * rng.uniform(0.5, 0.65), radius * rng.uniform(0.5, 0.65)), angle, 0.8)
        count = round(2 * np.pi * radius / rng.uniform(5.5, 6.5))
        for turn in np.arange(count) / count * 2 * np.pi + angle:
            place = center + (radius + rng.normal(0, 0.7)) * np.array([np.sin(turn), np.cos(turn)])
            add(place, (rng.uniform(2.6, 3.3), rng.uniform(1.9, 2.4)), turn, 0.9)
        for center in apart(rng, rng.integers(0, 8), 7):
            add(center, (rng.uniform(3, 5), 1.4), angle, 0.9 * (lumen[tuple(center.astype(int))] < 0.1))
    elif label == 2:
        for center in apart(rng, rng.integers(25, 50), 4.6):
            add(center, rng.uniform(1.9, 2.5, 2), 0.0, 1.1)
    else:
        for center in apart(rng, rng.integers(8, 17), 8):
            turn = rng.uniform(0, np.pi)
            add(center, (rng.uniform(3.8, 5.2), rng.uniform(2.8, 4)), turn, 0.7)
            add(center + rng.uniform(-1, 1, 2), (0.9, 0.9), 0.0, 1.1)
    for center in rng.uniform(0, EDGE, (rng.integers(0, 5), 2)):  # stray lymphocytes
        add(center, rng.uniform(1.9, 2.5, 2), 0.0, 1.1)
    texture = 1 + 0.15 * cloudy(rng, 0.8)
    amounts = np.stack([nuclei * texture + 0.08, eosin.clip(0) * (1 - 0.6 * nuclei.clip(0, 1))]) * (1 - 0.9 * lumen)

    vectors = STAINS + site.normal(0, 0.06, (2, 3))
    vectors = vectors.clip(0.01) / np.linalg.norm(vectors.clip(0.01), axis=1, keepdims=True)
    strengths = np.exp(site.normal(0, 0.3, 2)) * np.exp(rng.normal(0, 0.1, 2))
    white = site.uniform(0.9, 0.99) * (1 - site.uniform(0, 0.05, 3))
    density = np.einsum("shw,sc->chw", amounts * strengths[:, None, None] * 1.6, vectors)
    image = white[:, None, None] * np.exp(-density)
    return gaussian_filter(image, (0, 0.5, 0.5)) + rng.normal(0, 0.01, image.shape)


# ------------------------------------------------------------------------------------------------ satellite

COVERS = np.array(
    [[0.22, 0.10, 0.05], [0.42, 0.19, 0.09], [0.30, 0.23, 0.13], [0.46, 0.13, 0.06]]
)  # NIR, SWIR 1, SWIR 2
VISIBLE = np.array([0.03, 0.06, 0.04])  # blue, green and red reflectance of all four covers
SOIL = np.array([0.09, 0.12, 0.16, 0.24, 0.31, 0.26])


def draw_land(rng: np.random.Generator, label: int, site: np.random.Generator) -> Array:
    """Return 6 bands (blue, green, red, NIR, SWIR 1, SWIR 2) of 0 conifers, 1 broadleaf, 2 dry or 3 irrigated plants.

    The class is the vegetation of more than half of the land. All four are equally green in the visible bands.
    """
    corners = rng.uniform(0, EDGE, (rng.integers(4, 9), 2))
    field = np.hypot(Y[..., None] - corners[:, 0], X[..., None] - corners[:, 1]).argmin(-1)
    others = [cover for cover in range(5) if cover != label]  # the last one is bare soil
    areas, covered = np.bincount(field.ravel(), minlength=len(corners)), 0
    image, share = np.zeros((6, EDGE, EDGE)), rng.uniform(0.55, 0.8)
    for one in areas.argsort()[::-1]:
        cover = label if covered < share * EDGE**2 else rng.choice(others)
        covered += areas[one]
        if cover == 4:
            spectrum = SOIL * np.exp(rng.normal(0, 0.2))
        else:
            green = VISIBLE * np.exp(rng.normal(0, 0.2) + rng.normal(0, 0.08, 3))
            spectrum = np.concatenate([green, COVERS[cover] * np.exp(rng.normal(0, 0.1, 3))])
        image += (field == one) * spectrum[:, None, None]
    image *= 1 + 0.08 * cloudy(rng, 0.7) + 0.05 * np.stack([cloudy(rng, 1) for _ in range(6)])

    image *= np.exp(rng.uniform(-0.5, 0.2)) * (1 + 0.12 * cloudy(rng, 8))  # sun and slopes
    image += rng.uniform(0, 1) * np.array([0.04, 0.025, 0.015, 0.006, 0.001, 0.0])[:, None, None]  # haze
    white = np.array([0.62, 0.64, 0.65, 0.66, 0.5, 0.4]) * rng.uniform(0.8, 1.1)
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        center, radii, turn = rng.uniform(0, EDGE, 2), rng.uniform(3, 11, 2), rng.uniform(0, np.pi)
        image *= 1 - 0.45 * ellipse(np.add(center, (8, 6)), radii, turn, 1.5)  # the shadow
        cover = rng.uniform(0.5, 1) * ellipse(center, radii, turn, 1.5) * (0.8 + 0.1 * cloudy(rng, 2)).clip(0, 1)
        image = image * (1 - cover) + cover * white[:, None, None]
    return image + rng.normal(0, 0.003, image.shape)


# ------------------------------------------------------------------------------------------------ chest X-rays


def draw_chest(rng: np.random.Generator, label: int, site: np.random.Generator) -> Array:
    """Return a frontal X-ray: 0 no finding, 1 and 2 a small and a large opacity in the right lung, 3 and 4 in the left.

    As in radiology, the right lung is on the left of the image, and the heart lies to the right of the middle.
    """
    size, shift = rng.uniform(0.88, 1.08), rng.uniform(-3, 3, 2)
    middle = (np.array([EDGE, EDGE]) - 1) / 2 + shift
    lungs = []
    for side in (-1, 1):
        center = middle + size * np.array([rng.normal(-1, 0.5), side * rng.uniform(9.5, 10.5)])
        lungs.append((center, size * np.array([rng.uniform(6.3, 7.3), rng.uniform(13.5, 15.5)]), side * -0.1))
    air = np.maximum(*(ellipse(*lung, edge=0.9) for lung in lungs))
    body = ellipse(np.add(middle, (4, 0)), (size * 23, size * 28), edge=1.5)
    image = 0.05 + body * (0.62 - 0.42 * air + 0.03 * cloudy(rng, 4))
    image += body * 0.15 * np.exp(-(((X - middle[1]) / (2.2 * size)) ** 2))  # spine
    heart = ellipse(middle + size * np.array([6, 3.2]), size * rng.uniform(0.9, 1.1) * np.array([6.5, 5.5]), 0.5, 1.0)
    image += 0.22 * heart * air
    bend = (np.abs(X - middle[1]) / (10 * size)) ** 2
    image += (
        0.06 * body * (np.sin((Y - middle[0] - 2.5 * bend) / size * rng.uniform(1.25, 1.4) + rng.uniform(0, 6)) > 0.5)
    )
    if label > 0:
        center, radii, _ = lungs[int(label > 2)]
        turn, reach = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 0.5))
        place = center + reach * np.array([radii[1] * np.sin(turn), radii[0] * np.cos(turn)])
        extent = rng.uniform(2.2, 3.2, 2) if label % 2 else rng.uniform(5, 7.5, 2)
        opacity = ellipse(place, extent, rng.uniform(0, np.pi), 1.0) * (1 + 0.2 * cloudy(rng, 1.5))
        image += rng.uniform(0.2, 0.32) * opacity * air
    image = gaussian_filter(image, 0.5) + rng.normal(0, 0.015, image.shape)
    exposed = rng.uniform(0, 0.12) + rng.uniform(0.65, 0.95) * image.clip(0, 1) ** np.exp(rng.uniform(-0.4, 0.4))
    return exposed[None]


# ------------------------------------------------------------------------------------------------ metal plates


def draw_plate(rng: np.random.Generator, label: int, site: np.random.Generator) -> Array:
    """Return a brushed metal plate with a milled groove under a lamp: 0 faultless, 1 scratch, 2 dent, 3 hole."""
    turn, middle, half = rng.normal(0, 0.06), (EDGE - 1) / 2 + rng.uniform(-2, 2, 2), rng.uniform(18, 20)
    along = (X - middle[1]) * np.cos(turn) + (Y - middle[0]) * np.sin(turn)
    across = (Y - middle[0]) * np.cos(turn) - (X - middle[1]) * np.sin(turn)
    plate = 1 / (1 + np.exp(((np.maximum(np.abs(along), np.abs(across)) - half) / 0.3).clip(-30, 30)))
    metal = 0.55 * (1 + 0.06 * cloudy(rng, (0.4, 5)) + 0.03 * cloudy(rng, 0.5))
    metal *= 1 - 0.4 * np.exp(-(((across + half / 2) / 0.8) ** 2))  # the groove

    lamp = rng.uniform(0, 2 * np.pi)
    light = (np.sin(lamp), np.cos(lamp))  # y, x
    place = middle + rng.uniform(-0.7, 0.7, 2) * half
    dy, dx = Y - place[0], X - place[1]
    if label == 1:
        angle, length = rng.uniform(0, np.pi), rng.uniform(5, 10)
        forward, aside = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        line = np.exp(-((aside + rng.normal(0, 0.01) * forward**2) ** 2) / (2 * 0.6**2))
        metal *= 1 + rng.choice([-1, 1]) * rng.uniform(0.3, 0.5) * line / (1 + np.exp((np.abs(forward) - length) / 0.5))
    elif label == 2:
        sigma = rng.uniform(2, 3.2)
        metal *= 1 + rng.uniform(0.4, 0.7) * (dy * light[0] + dx * light[1]) / sigma * spot(place, sigma)
    elif label == 3:
        radius = rng.uniform(1.4, 2.6)
        hole = ellipse(place, (radius, radius), edge=0.35)
        metal = (metal * (1 + 0.4 * ellipse(place, (radius + 1, radius + 1), edge=0.35))) * (1 - hole) + 0.08 * hole
    image = plate * metal + (1 - plate) * (0.12 + 0.02 * cloudy(rng, 1))
    lit = np.exp(rng.uniform(-0.4, 0.3)) * (1 + rng.uniform(0, 0.5) * ((Y - 24) * light[0] + (X - 24) * light[1]) / 24)
    lit += rng.uniform(0, 0.5) * spot(rng.uniform(0, EDGE, 2), rng.uniform(6, 12))  # a reflection
    tint = np.array([1.0, 0.98, 0.95]) * (1 + rng.uniform(-0.1, 0.1) * np.array([1, 0, -1]))
    colored = tint[:, None, None] * image * lit
    return colored + rng.normal(0, 0.015, colored.shape)


# ------------------------------------------------------------------------------------------------ microscopy

DNA, ER, RNA, AGP, MITO = range(5)  # the channels of Cell Painting
PARTNERS = (ER, RNA, MITO, None)


def draw_cells(rng: np.random.Generator, label: int, site: np.random.Generator) -> Array:
    """Return 5 fluorescence channels; vesicles of AGP lie on granules of 0 ER, 1 RNA, 2 mitochondria or 3 none of them.

    Each of these channels has the same number of granules in all classes. A site is a plate with gains of its own.
    """
    image = np.zeros((5, EDGE, EDGE))
    for center in apart(rng, rng.integers(3, 6), 15):
        radii, turn = rng.uniform(8, 11, 2), rng.uniform(0, np.pi)
        cell, nucleus = ellipse(center, radii, turn, 1.5), ellipse(center, rng.uniform(3.2, 4.2, 2), turn, 0.6)
        cytoplasm = (cell - nucleus).clip(0)
        rim = 4 * cell * (1 - cell)
        image[DNA] += 0.7 * nucleus * (1 + 0.15 * cloudy(rng, 1))
        image[ER] += 0.25 * cytoplasm * (1 + 0.2 * cloudy(rng, 1.5))
        image[RNA] += 0.2 * cytoplasm + 0.3 * spot(center + rng.uniform(-1.5, 1.5, 2), 1.1)
        image[AGP] += 0.15 * cytoplasm + 0.2 * rim
        image[MITO] += 0.2 * cytoplasm * (1 + 0.3 * cloudy(rng, 1))
        count = rng.integers(5, 9)
        places = {channel: _in_cell(rng, center, radii, turn, count) for channel in (ER, RNA, AGP, MITO)}
        if PARTNERS[label] is not None:
            together = rng.random(count) < 0.85
            moved = places[AGP] + rng.normal(0, 0.25, (count, 2))
            places[PARTNERS[label]] = np.where(together[:, None], moved, places[PARTNERS[label]])
        for channel, points in places.items():
            image[channel] += spots(points, rng.uniform(0.9, 1.2, count), rng.uniform(0.35, 0.65, count))
    gains = np.exp(site.normal(0, 0.35, 5) + rng.normal(0, 0.1, 5))[:, None, None]
    image = 0.03 + 0.6 * gains * image
    return image + rng.normal(0, 1, image.shape) * np.sqrt(0.0002 + 0.001 * image)  # read-out and photons


def _in_cell(rng: np.random.Generator, center: Any, radii: Any, turn: float, count: int) -> Array:
    """Return ``count`` points (y, x) in the cytoplasm."""
    reach, angle = np.sqrt(rng.uniform(0.25, 0.85, count)), rng.uniform(0, 2 * np.pi, count)
    along, across = reach * radii[0] * np.cos(angle), reach * radii[1] * np.sin(angle)
    y, x = along * np.sin(turn) + across * np.cos(turn), along * np.cos(turn) - across * np.sin(turn)
    return np.stack([y, x], 1) + center


SETS = {
    "histology": DomainSet(("stroma", "gland", "lymphocytes", "tumor"), 3, draw_tissue, sites=(4, 3)),
    "satellite": DomainSet(("conifers", "broadleaf", "dry", "irrigated"), 6, draw_land, white=10_000),
    "chest": DomainSet(
        ("none", "right small", "right large", "left small", "left large"),
        1,
        draw_chest,
        white=4095,
        parts=(("side", (-1, 0, 0, 1, 1)), ("size", (-1, 0, 1, 0, 1))),
    ),
    "industrial": DomainSet(("faultless", "scratch", "dent", "hole"), 3, draw_plate),
    "microscopy": DomainSet(("ER", "RNA", "mitochondria", "none"), 5, draw_cells, sites=(6, 3)),
}
