"""Tables of image paths and captions: CSV, TSV, JSON lines and parquet files, and their dataset."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_contrast._checks import check_caption, check_choice, fail
from lightning_contrast.contracts import IMAGE_KEY, INDEX_KEY, TEXT_KEY
from lightning_contrast.data._folder_images import FolderImages, Loader, stacked

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


class Pair(NamedTuple):
    """A row of a table."""

    path: str
    caption: str


def read_pairs(table: Path, image_column: str, text_column: str, root: Path | None) -> list[Pair]:
    """Read a table and check every row.

    Args:
        table: A ``.csv`` or ``.tsv`` file with a header, a ``.jsonl`` file of one object per line, or a ``.parquet``
            file (needs the extra ``pairs``).
        image_column: Name of the column with the paths.
        text_column: Name of the column with the captions.
        root: Folder of relative paths; None is that of the table.

    Raises:
        FileNotFoundError: If the table or an image is missing; the message names the line.
        ValueError: If a column is missing, a caption or a path is empty, or the table has no rows.
    """
    if not table.is_file():
        fail("table", "be a file", str(table), "Set it to the file with the paths and captions", FileNotFoundError)
    check_choice("table", table.suffix, TABLES)
    pairs, folder = [], table.parent if root is None else root
    for place, row in _rows(table):
        where = f"{table.name}, {place}"
        for column in (image_column, text_column):
            if row.get(column) is None:
                hint = "Name the columns with `image_column` and `text_column`"
                fail(where, f"have a value in the column {column!r}", sorted(map(str, row)), hint)
        if not str(row[image_column]).strip():
            fail(where, "name an image", row[image_column], "Give the path of a file")
        path = folder / str(row[image_column]).strip()
        if not path.is_file():
            hint = "Correct the path, remove the row, or set `root` to the folder of the paths"
            fail(where, "name an existing image", str(path), hint, FileNotFoundError)
        pairs.append(Pair(str(path), check_caption(row[text_column], where)))
    if not pairs:
        fail("table", "hold at least one row", str(table), "Write one line per image")
    return pairs


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each row's place, lines from 1, and the row."""
    if table.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            hint = "pip install 'lightning_contrast[pairs]'"
            raise ModuleNotFoundError(f"Parquet files need pyarrow: {hint}.") from error
        for number, row in enumerate(parquet.read_table(table).to_pylist(), 1):
            yield f"row {number}", row
        return
    with table.open(encoding="utf-8-sig", newline="") as file:
        if table.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", _object(line, f"{table.name}, line {number}")
            return
        reader = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",")
        _ = reader.fieldnames  # reads the header
        last = reader.line_num
        for row in reader:
            yield f"line {last + 1}", row  # the first line of the row: a quoted caption may have several
            last = reader.line_num


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        fail(where, "be a JSON object", f"{line.strip()[:40]} ({error})", "Write one object per line")
    if not isinstance(row, dict):
        fail(where, "be a JSON object", line.strip()[:40], 'Write {"path": ..., "caption": ...}')
    return row


class PairImages(FolderImages):
    """Image files with captions, decoded and resized on access.

    Args:
        pairs: Paths and captions.
        size: Height and width, in pixels.
        resize: "whole", "crop", "center" or "squash".
        loader: Function that reads one file.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, resize: str, loader: Loader) -> None:
        super().__init__([pair.path for pair in pairs], [-1] * len(pairs), size, resize, loader, indices=True)
        self.captions = [pair.caption for pair in pairs]

    def collate(self, samples: Sequence[Any]) -> Any:
        """Return a dict of images ``(B, C, size, size)``, B texts and positions ``(B,)``."""
        images, _, positions = super().collate(samples)
        return {IMAGE_KEY: images, TEXT_KEY: [self.captions[i] for i in positions.tolist()], INDEX_KEY: positions}


def collate_pairs(samples: Sequence[tuple[Tensor, str]]) -> dict[str, Any]:
    """Return a dict of images ``(B, C, size, size)`` and B texts.

    Args:
        samples: An image ``(C, size, size)``, as `_folder_images.resized` returns it, and a caption each.
    """
    return {IMAGE_KEY: stacked([image for image, _ in samples]), TEXT_KEY: [text for _, text in samples]}
