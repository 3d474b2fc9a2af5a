"""The table of vectors in a folder, in LanceDB: every write is one commit, which a killed process makes or does not."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_contrast._checks import fail, require
from lightning_contrast.serving.app import require_packages

Rows = Sequence[Mapping[str, Any]]
_NAME, _FACTS = "images", b"lightning_contrast"
_LOCK = "writer.lock"
VECTOR = "vector"
_OLD = timedelta(days=1)  # replaced versions of the table are kept for readers


class VectorTable:
    """A table with a row per image: its path, columns of plain values and a unit vector.

    Args:
        folder: Folder of the store.
        facts: Plain values that are stored with a new table; of a table that exists, its own are read.
        dim: Length D of the vectors of a new table.

    Attributes:
        facts: The stored values.
        dim: D.

    Raises:
        ValueError: If the folder holds other files, or a table of another kind.
        FileNotFoundError: If there is no table and ``facts`` is None.
        ModuleNotFoundError: If LanceDB is not installed.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any] | None = None, dim: int = 0) -> None:
        require_packages("search", ("lancedb", "pyarrow"))
        import lancedb

        self.folder = folder
        hint = "Give a new folder, or that of an index"
        if folder.exists():
            known = folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {f"{_NAME}.lance", _LOCK}
            require(known, "store", "be the folder of an index", str(folder), hint)
        elif facts is None:
            raise FileNotFoundError(f"There is no index in {folder}.")
        self._database = lancedb.connect(str(folder), read_consistency_interval=timedelta(0))  # others may write
        self._table = self._open()
        if self._table is None:
            if facts is None:
                raise FileNotFoundError(f"There is no index in {folder}.")
            with self.writing():
                self._table = self._open()  # another process may have made it since
                if self._table is None:
                    self._table = self._create(facts, dim)
        saved = (self._table.schema.metadata or {}).get(_FACTS)
        if saved is None:
            fail("store", "be the folder of an index", str(folder), hint)
        self.facts: dict[str, Any] = json.loads(saved)
        self.dim = int(self._table.schema.field(VECTOR).type.list_size)

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def _open(self) -> Any:
        """Return the table, or None if there is none or a killed process began to make it."""
        try:
            return self._database.open_table(_NAME)
        except ValueError:
            return None

    def _create(self, facts: Mapping[str, Any], dim: int) -> Any:
        import pyarrow as pa

        numbers = ("bytes", "changed_ns", "width", "height")
        columns = [("path", pa.string()), ("folder", pa.string()), ("digest", pa.string())]
        columns += [*((name, pa.int64()) for name in numbers), (VECTOR, pa.list_(pa.float32(), dim))]
        schema = pa.schema(columns, metadata={_FACTS: json.dumps(facts)})
        begun = (self.folder / f"{_NAME}.lance").exists()  # by a process that was killed
        return self._database.create_table(_NAME, schema=schema, mode="overwrite" if begun else "create")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other processes from writing inside the block; the system ends the lock of a killed process.

        Raises:
            RuntimeError: If another process writes.
        """
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RuntimeError(f"Another process is writing to the index in {self.folder}.") from error
            yield

    def put(self, rows: Rows, vectors: NDArray[np.float32], *, replace: bool) -> None:
        """Write rows in one commit.

        Args:
            rows: The columns without the vector, B of them.
            vectors: Unit rows (B, D).
            replace: Whether rows of the same path may exist, which are replaced.
        """
        import pyarrow as pa

        schema = self._table.schema
        flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
        columns = {name: [row[name] for row in rows] for name in schema.names if name != VECTOR}
        columns[VECTOR] = pa.FixedSizeListArray.from_arrays(flat, self.dim)
        table = pa.table(columns, schema=schema)
        if replace:
            merge = self._table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(table)
        else:
            self._table.add(table)

    def remove(self, paths: Sequence[str]) -> None:
        """Remove the rows of paths, in one commit per thousand."""
        for start in range(0, len(paths), 1000):
            part = ", ".join(map(quoted, paths[start : start + 1000]))
            self._table.delete(f"path IN ({part})")

    def compact(self) -> None:
        """Join small files, add new rows to the vector index if there is one, and delete versions older than a day."""
        self._table.optimize(cleanup_older_than=_OLD)

    def build_index(self, **options: Any) -> None:
        """Build the approximate vector index, inverted lists with exact vectors; see LanceDB's ``IvfFlat``."""
        from lancedb.index import IvfFlat

        self._table.create_index(VECTOR, config=IvfFlat(distance_type="cosine", **options), replace=True)

    def nearest(
        self, query: NDArray[np.float32], k: int, where: str | None, probes: int | None
    ) -> list[dict[str, Any]]:
        """Return the k rows with the highest cosine, with "score", highest first.

        Args:
            query: A vector (D,), not 0.
            k: Number of rows, >= 1.
            where: SQL condition on the columns, applied first; None for all rows.
            probes: Lists of the vector index that are searched, >= 1; None for an exact search of all rows.

        Raises:
            ValueError: If the condition is not valid.
        """
        search: Any = self._table.search(query, vector_column_name=VECTOR)
        search = search.distance_type("cosine").limit(k)
        search = search.bypass_vector_index() if probes is None else search.nprobes(probes)
        if where is not None:
            search = search.where(where, prefilter=True)
        names = [name for name in self._table.schema.names if name != VECTOR]
        try:
            rows = search.select([*names, "_distance"]).to_list()
        except Exception:
            if where is not None:
                self._check_condition(where, names)
            raise
        return [row | {"score": max(-1.0, min(1.0, 1 - row.pop("_distance")))} for row in rows]

    def _check_condition(self, where: str, names: Sequence[str]) -> None:
        """Raise a ValueError unless rows can be counted by a condition."""
        try:
            self._table.count_rows(where)
        except Exception as error:  # of several types
            hint = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(
                f"`where` must be an SQL condition on {', '.join(names)}, got {where!r}. {hint}."
            ) from error

    def columns(self, *names: str, where: str | None = None) -> dict[str, list[Any]]:
        """Return whole columns of plain values, sorted by path."""
        search = self._table.search().select(list({"path", *names}))
        if where is not None:
            search = search.where(where)
        table = search.limit(max(1, len(self))).to_arrow().sort_by("path")
        return {name: table.column(name).to_pylist() for name in names}

    def vectors(self) -> tuple[list[str], torch.Tensor]:
        """Return the paths, sorted, and their unit rows (N, D), float32."""
        table = self._table.to_arrow().select(["path", VECTOR]).sort_by("path").combine_chunks()
        flat = np.array(table.column(VECTOR).combine_chunks().flatten(), dtype=np.float32)
        return table.column("path").to_pylist(), torch.from_numpy(flat).view(-1, self.dim)

    def size_on_disk(self) -> int:
        """Return the bytes of all files of the store."""
        folders = os.walk(self.folder)
        return sum(os.stat(os.path.join(folder, name)).st_size for folder, _, names in folders for name in names)


def quoted(text: str) -> str:
    """Return a text as a string of SQL."""
    return "'" + text.replace("'", "''") + "'"
