"""Image files of a folder: hidden ones are left out, and links are followed without counting an image twice."""

import os
from pathlib import Path
from typing import TypeAlias

FileId: TypeAlias = tuple[int, int]
"""Device and inode: equal for all links to a file."""


def find_images(folder: Path, extensions: tuple[str, ...], *, deep: bool) -> dict[FileId, str]:
    """Return the image files of a folder, each once, sorted by path.

    Hidden files and folders, whose names begin with a dot, are left out. Links are followed; of several that lead to
    one file the first path counts, and a link back to a folder above ends there.

    Args:
        folder: The folder; its own name may begin with a dot.
        extensions: File extensions in lower case; ``("",)`` for all files.
        deep: Whether to include the folders below.
    """
    found: list[tuple[str, FileId]] = []
    _walk(str(folder), extensions, deep, set(), found)
    files: dict[FileId, str] = {}
    for path, file_id in sorted(found):
        files.setdefault(file_id, path)
    return files


def _walk(
    folder: str, extensions: tuple[str, ...], deep: bool, above: set[FileId], found: list[tuple[str, FileId]]
) -> None:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that contains it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if deep:
                    _walk(entry.path, extensions, deep, above | {here}, found)
            elif entry.name.lower().endswith(extensions):
                found.append((entry.path, _file_id(entry, status.st_dev)))


def _file_id(entry: "os.DirEntry[str]", device: int) -> FileId:
    if not entry.is_symlink():
        return device, entry.inode()  # known from the listing of the folder, without a call per file
    try:
        status = entry.stat()
    except FileNotFoundError:  # a broken link: reading it raises, or skips it
        return device, entry.inode()
    return status.st_dev, status.st_ino
