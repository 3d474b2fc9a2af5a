"""The nearest neighbours of a few fixed images, followed over a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast.callbacks.visualization.images import Color, Row, Tile, grid
from lightning_contrast.callbacks.visualization.sample import Gallery
from lightning_contrast.callbacks.visualization.scatter import class_word

if TYPE_CHECKING:
    from PIL.Image import Image

HISTORY = 5
"""Measurements shown: the first one and the newest."""
SAME: Color = (46, 160, 67)
OTHER: Color = (218, 54, 51)


class Strip(NamedTuple):
    """The neighbours of the queries at one measurement."""

    when: str
    neighbours: Tensor
    """Names of pictures (Q, K), int64, nearest first; 0 where there is none."""


class Strips:
    """Chooses queries at the first measurement and finds them again, wherever they are, in all later ones.

    Args:
        queries: How many.
        neighbours: Shown for each.
    """

    def __init__(self, queries: int, neighbours: int) -> None:
        self.queries, self.neighbours = queries, neighbours
        self.clear()

    def clear(self) -> None:
        """Forget queries and history."""
        self.names = torch.zeros(0, dtype=torch.int64)
        self.history: list[Strip] = []

    def measure(self, gallery: Gallery, when: str) -> int:
        """Take the neighbours (cosine) of the queries among the images of a gallery.

        Args:
            gallery: N >= 2 images with finite features.
            when: Words for the measurement.

        Returns:
            How many of the queries are not in the gallery.
        """
        if len(self.names) == 0:
            count = min(self.queries, len(gallery.names))
            chosen = gallery.names[torch.arange(count) * len(gallery.names) // count]
            self.names = torch.tensor(list(dict.fromkeys(chosen.tolist())), dtype=torch.int64)
        rows, known = _rows_of(self.names, gallery)
        features = F.normalize(gallery.features, dim=1)
        cosines = features[rows] @ features.T
        # The query itself is no neighbour, nor is another copy of its picture.
        cosines = cosines.masked_fill(gallery.names.unsqueeze(0) == self.names.unsqueeze(1), -2.0)
        nearest = cosines.topk(min(self.neighbours, len(gallery.names) - 1), dim=1)
        found = gallery.names[nearest.indices]
        found = found.masked_fill(nearest.values < -1.5, 0).masked_fill(~known.unsqueeze(1), 0)
        self.history.append(Strip(when, found))
        if len(self.history) > HISTORY:
            del self.history[1]
        return int((~known).sum())

    def draw(self, gallery: Gallery, class_names: Sequence[str] | None) -> "Image":
        """Draw a group of rows for each query, one row for each measurement.

        A frame is green around a neighbour of the query's class and red around one of another class.

        Args:
            gallery: Where the pictures of queries and neighbours are; one that is not there stays empty.
            class_names: A word for each class.
        """
        width = max(strip.neighbours.shape[1] for strip in self.history)
        rows = []
        for number, name in enumerate(self.names):
            for place, strip in enumerate(self.history):
                query = self._tile(gallery, name, None) if place == 0 else None
                tiles = [self._tile(gallery, other, name) for other in strip.neighbours[number]]
                words = strip.when
                if place == 0 and gallery.labels is not None:
                    row, known = _rows_of(name.reshape(1), gallery)
                    words += f"\n{class_word(int(gallery.labels[row[0]]), class_names)}" if bool(known[0]) else ""
                rows.append(Row([query, *tiles], words, gap=place == 0 and number > 0))
        titles = ["query", *(f"{n}." for n in range(1, width + 1))]
        return grid(rows, titles, gallery.pictures.shape[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return names of pictures only: K numbers for each query and measurement."""
        return {"queries": self.names, "history": [(strip.when, strip.neighbours) for strip in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.names = state["queries"]
        self.history = [Strip(when, neighbours) for when, neighbours in state["history"]]

    @staticmethod
    def _tile(gallery: Gallery, name: Tensor, query: Tensor | None) -> Tile | None:
        """Return the picture of a name, framed by whether it has the label of the query."""
        row, known = _rows_of(name.reshape(1), gallery)
        if not bool(known[0]):
            return None
        frame = None
        if query is not None and gallery.labels is not None:
            of_query, there = _rows_of(query.reshape(1), gallery)
            label, own = int(gallery.labels[row[0]]), int(gallery.labels[of_query[0]])
            frame = None if min(label, own) < 0 or not bool(there[0]) else SAME if label == own else OTHER
        return Tile(gallery.pictures[row[0]], frame)


def _rows_of(names: Tensor, gallery: Gallery) -> tuple[Tensor, Tensor]:
    """Return the first row of each name (Q,), 0 where there is none, and whether there is one."""
    equal = names.unsqueeze(1) == gallery.names.unsqueeze(0)
    return equal.byte().argmax(dim=1), equal.any(dim=1)
