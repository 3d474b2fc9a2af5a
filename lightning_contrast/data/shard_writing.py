"""Shards from a folder of images, for `StreamingImageDataModule`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_contrast._checks import check_at_least, check_choice, require
from lightning_contrast.data.chunk_copies import CLASSES, import_litdata, missing
from lightning_contrast.data.folder_module import EXTENSIONS, list_images
from lightning_contrast.seeding import derived_seed


def write_shards(
    folder: str | Path,
    output: str | Path,
    *,
    format: Literal["litdata", "webdataset"] = "litdata",
    images_per_shard: int = 1000,
    like: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Copy the images of a folder to shards, in a random order and unchanged: the files are not encoded again.

        lc.data.write_shards("images/train", "shards/train")
        lc.data.write_shards("images/val", "shards/val", like="shards/train")

    Classes are the folders in ``folder``, as in `ImageFolderDataModule`; without them records have no label. The names
    of the classes are written to ``classes.json``, last, so that an unfinished folder is recognized by its absence.

    Args:
        folder: Folder of the images.
        output: Folder of the shards; new or empty.
        format: "litdata" writes its chunks, as its ``optimize``: records ``{"image": content, "label": number}``.
            "webdataset" writes tar files with ``000000000.jpg`` and ``000000000.cls``.
        images_per_shard: Number of images of a shard, >= 1; the last one may have fewer. 1,000 photographs are about
            100 MB. Give at least one shard for each worker of all processes.
        like: Folder of shards written before, whose class numbers are used: for validation images.
        seed: Seed of the random order, >= 0.
        progress: Called with the number of images that are written and the number of all images.

    Returns:
        The folder of the shards.

    Raises:
        ValueError: If a value is out of range, the folder has no images, the output is not empty, or a class is not
            one of ``like``.
        FileNotFoundError: If a folder is missing.
        ModuleNotFoundError: If the extra ``stream`` is not installed.
    """
    check_choice("format", format, ("litdata", "webdataset"))
    check_at_least("images_per_shard", images_per_shard, 1)
    check_at_least("seed", seed, 0)
    found, classes = list_images("folder", Path(folder), EXTENSIONS, "images")
    if like is not None:
        names = Path(like) / CLASSES
        if not names.is_file():
            raise FileNotFoundError(f"`like` must be a folder of shards with {CLASSES}, got {str(like)!r}.")
        known = tuple(json.loads(names.read_text(encoding="utf-8")))
        extra = sorted(set(classes) - set(known))
        require(not extra, "folder", f"have only classes of {like}", extra, "Use the same class folders")
        classes = known if classes else ()
    numbers = {name: number for number, name in enumerate(classes)}
    files = [(path, None if name is None else numbers[name]) for path, name in found.values()]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(derived_seed(seed))).tolist()
    target = Path(output)
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(empty, "output", "be a new or empty folder", str(output), "Remove it, or give another one")
    write = _write_litdata if format == "litdata" else _write_tars
    write([files[place] for place in order], target, images_per_shard, progress or (lambda done, total: None))
    (target / CLASSES).write_text(json.dumps(classes), encoding="utf-8")
    return target


Files = Sequence[tuple[str, int | None]]


def _write_litdata(files: Files, target: Path, count: int, progress: Callable[[int, int], None]) -> None:
    import_litdata()
    from litdata.streaming import Cache  # type: ignore[import-untyped]

    target.mkdir(parents=True, exist_ok=True)
    cache = Cache(str(target), chunk_size=count)
    for place, (path, label) in enumerate(files):
        record: dict[str, Any] = {"image": Path(path).read_bytes()}
        cache[place] = record if label is None else record | {"label": label}
        progress(place + 1, len(files))
    cache.done()
    cache.merge(1)


def _write_tars(files: Files, target: Path, count: int, progress: Callable[[int, int], None]) -> None:
    try:
        from webdataset import ShardWriter  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing("webdataset") from error
    target.mkdir(parents=True, exist_ok=True)
    pattern = str(target).replace("%", "%%") + "/shard-%06d.tar"
    with ShardWriter(pattern, maxcount=count, maxsize=float("inf"), verbose=0, mtime=0.0) as writer:
        for place, (path, label) in enumerate(files):
            ending = Path(path).suffix.lower().lstrip(".")
            sample = {"__key__": f"{place:09d}", ending: Path(path).read_bytes()}
            writer.write(sample if label is None else sample | {"cls": str(label)})
            progress(place + 1, len(files))
