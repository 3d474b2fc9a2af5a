"""Nearest neighbors of fixed query images over a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast.callbacks.visualization.images import Color, Row, Tile, grid
from lightning_contrast.callbacks.visualization.sample import Sample
from lightning_contrast.callbacks.visualization.scatter import class_word

if TYPE_CHECKING:
    from PIL.Image import Image

HISTORY = 5
"""Number of measurements shown: the first and the newest."""
SAME: Color = (46, 160, 67)
OTHER: Color = (218, 54, 51)


class Neighbors(NamedTuple):
    """Neighbors of the queries at one measurement."""

    when: str
    """Description of the time, e.g. "epoch 3"."""
    ids: Tensor
    """Ids of the neighbors, nearest first, int64, ``(Q, K)``; 0 for none."""


class NeighborHistory:
    """Queries chosen at the first measurement, and their nearest neighbors at later ones.

    Args:
        queries: Number of queries.
        neighbours: Number of neighbors of each query.
    """

    def __init__(self, queries: int, neighbours: int) -> None:
        self.queries, self.neighbours = queries, neighbours
        self.clear()

    def clear(self) -> None:
        """Reset queries and history."""
        self.ids = torch.zeros(0, dtype=torch.int64)
        self.history: list[Neighbors] = []

    def measure(self, sample: Sample, when: str) -> int:
        """Add the nearest neighbors of the queries by cosine similarity.

        Args:
            sample: N >= 2 images with finite features.
            when: Description of the time.

        Returns:
            The number of queries that are missing from the sample.
        """
        if len(self.ids) == 0:
            count = min(self.queries, len(sample.ids))
            chosen = sample.ids[torch.arange(count) * len(sample.ids) // count]
            self.ids = torch.tensor(list(dict.fromkeys(chosen.tolist())), dtype=torch.int64)
        rows, found = _rows_of(self.ids, sample)
        features = F.normalize(sample.features, dim=1)
        cosines = features[rows] @ features.T
        # Exclude the query and other copies of its image.
        cosines = cosines.masked_fill(sample.ids.unsqueeze(0) == self.ids.unsqueeze(1), -2.0)
        nearest = cosines.topk(min(self.neighbours, len(sample.ids) - 1), dim=1)
        ids = sample.ids[nearest.indices]
        ids = ids.masked_fill(nearest.values < -1.5, 0).masked_fill(~found.unsqueeze(1), 0)
        self.history.append(Neighbors(when, ids))
        if len(self.history) > HISTORY:
            del self.history[1]
        return int((~found).sum())

    def draw(self, sample: Sample, class_names: Sequence[str] | None) -> "Image":
        """Draw a group of rows for each query, with one row for each measurement.

        Neighbors of the query's class have a green frame, neighbors of other classes a red one.

        Args:
            sample: Source of the pictures; tiles of images that are missing from it stay empty.
            class_names: Name of each class; None for numbers.
        """
        width = max(neighbors.ids.shape[1] for neighbors in self.history)
        rows = []
        for number, query_id in enumerate(self.ids):
            for index, neighbors in enumerate(self.history):
                query = self._tile(sample, query_id, None) if index == 0 else None
                tiles = [self._tile(sample, other, query_id) for other in neighbors.ids[number]]
                words = neighbors.when
                if index == 0 and sample.labels is not None:
                    row, found = _rows_of(query_id.reshape(1), sample)
                    words += f"\n{class_word(int(sample.labels[row[0]]), class_names)}" if bool(found[0]) else ""
                rows.append(Row([query, *tiles], words, gap=index == 0 and number > 0))
        titles = ["query", *(f"{n}." for n in range(1, width + 1))]
        return grid(rows, titles, sample.pictures.shape[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return the ids of queries and neighbors."""
        return {"queries": self.ids, "history": [(neighbors.when, neighbors.ids) for neighbors in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the ids of queries and neighbors."""
        self.ids = state["queries"]
        self.history = [Neighbors(when, ids) for when, ids in state["history"]]

    @staticmethod
    def _tile(sample: Sample, image_id: Tensor, query: Tensor | None) -> Tile | None:
        """Return the picture of an id, with a frame that shows whether it has the label of the query."""
        row, found = _rows_of(image_id.reshape(1), sample)
        if not bool(found[0]):
            return None
        frame = None
        if query is not None and sample.labels is not None:
            query_row, query_found = _rows_of(query.reshape(1), sample)
            label, own = int(sample.labels[row[0]]), int(sample.labels[query_row[0]])
            frame = None if min(label, own) < 0 or not bool(query_found[0]) else SAME if label == own else OTHER
        return Tile(sample.pictures[row[0]], frame)


def _rows_of(ids: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return the first row of each id, ``(Q,)``, 0 if it is missing, and whether it was found, ``(Q,)``."""
    equal = ids.unsqueeze(1) == sample.ids.unsqueeze(0)
    return equal.byte().argmax(dim=1), equal.any(dim=1)
