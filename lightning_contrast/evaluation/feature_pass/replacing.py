"""Files that are complete or not there, also if several processes write them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a path to write to, which replaces a file once the block ends without an error.

    Each process has a path of its own, beside the file, so that two may write the same one.

    Args:
        path: Path of the file.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
