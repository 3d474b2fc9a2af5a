"""Writes embeddings with their pictures and labels for the projector of TensorBoard."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from fsspec.core import url_to_fs
from torch import Tensor

from lightning_contrast.callbacks.reporting import png_bytes, write_file
from lightning_contrast.callbacks.visualization.sample import Gallery

CONFIG = "projector_config.pbtxt"


def write_projector(
    folder: str, name: str, step: int, gallery: Gallery, words: Sequence[str] | None, *, keep: int
) -> None:
    """Add a snapshot of embeddings to what the projector shows of a run; the page opens with the newest.

    Snapshots of other names, as ``SummaryWriter.add_embedding`` writes them, stay. Pictures and labels are shared by
    snapshots that have the same ones.

    Differs from ``add_embedding``: no more than ``keep`` snapshots lie on the disk, a step that is written again takes
    the place of what was there, and pictures of any width and height are allowed.

    Args:
        folder: Of the run, where its events are.
        name: Of the embeddings; snapshots are called ``<name>:<step>``, the last ``<name> (newest, step <step>)``.
        step: Optimizer steps so far.
        gallery: What is shown.
        words: The label of each image in words; None: there are none.
        keep: Snapshots of this name that are kept, the first one and the newest.
    """
    config = _read_config(folder)
    below = f"projector/{name.replace('/', '_')}"
    mine = {e.tensor_path: e for e in config.embeddings if e.tensor_path.rpartition("/")[0] == below}
    others = [e for e in config.embeddings if e.tensor_path not in mine]
    entry = _write_snapshot(folder, below, f"{step:07d}", gallery, words)
    mine[entry.tensor_path] = entry
    by_step = [mine[path] for path in sorted(mine)]
    kept = by_step[:1] + by_step[1:][-(keep - 1) :] if keep > 1 else by_step[-1:]
    for each in kept:
        each.tensor_name = f"{name}:{_step_of(each):07d}"
    # The page sorts by name and opens the first: a space comes before a colon.
    kept[-1].tensor_name = f"{name} (newest, step {_step_of(kept[-1])})"
    del config.embeddings[:]
    config.embeddings.extend([*reversed(kept), *others])
    _write_config(folder, config)
    _remove_unused(folder, below, kept)


def _write_snapshot(folder: str, below: str, step: str, gallery: Gallery, words: Sequence[str] | None) -> Any:
    """Write the files of a snapshot and return its entry in the configuration."""
    from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo

    lines = ("\t".join(f"{value:.5g}" for value in row) for row in gallery.features.tolist())
    contents = {f"{below}/tensors_{step}.tsv": ("\n".join(lines) + "\n").encode()}
    # One column stands without a heading, several with one: so the projector reads it.
    labels = [str(i) for i in range(len(gallery.names))]
    if words is not None:
        labels = ["label\timage", *(f"{' '.join(word.split())}\t{i}" for i, word in enumerate(words))]
    table = ("\n".join(labels) + "\n").encode()
    sprite = png_bytes(_sprite(gallery.pictures))
    entry = EmbeddingInfo(
        tensor_path=f"{below}/tensors_{step}.tsv",
        metadata_path=f"{below}/metadata_{_digest(table)}.tsv",
        tensor_shape=list(gallery.features.shape),
    )
    entry.sprite.image_path = f"{below}/sprite_{_digest(sprite)}.png"
    entry.sprite.single_image_dim.extend([gallery.pictures.shape[3], gallery.pictures.shape[2]])
    contents |= {entry.metadata_path: table, entry.sprite.image_path: sprite}
    for path, content in contents.items():
        write_file(f"{folder}/{below}", path.rsplit("/", maxsplit=1)[1], content)
    return entry


def _step_of(entry: Any) -> int:
    return int(entry.tensor_path.rpartition("_")[2].removesuffix(".tsv"))


def _sprite(pictures: Tensor) -> Any:
    """Return all pictures in one square picture, row by row."""
    from PIL import Image

    count, _, height, width = pictures.shape
    side = math.ceil(math.sqrt(count))
    sheet = torch.full((side * side, 3, height, width), 255, dtype=torch.uint8)
    sheet[:count] = pictures
    sheet = sheet.view(side, side, 3, height, width).permute(0, 3, 1, 4, 2).reshape(side * height, side * width, 3)
    return Image.fromarray(sheet.numpy())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()


def _read_config(folder: str) -> Any:
    """Return the configuration of a run's projector, an empty one where there is none."""
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    files, root = url_to_fs(folder)
    config = ProjectorConfig()
    if files.exists(f"{root}/{CONFIG}"):
        text_format.Parse(files.cat_file(f"{root}/{CONFIG}").decode(), config)
    return config


def _write_config(folder: str, config: Any) -> None:
    from google.protobuf import text_format

    write_file(folder, CONFIG, text_format.MessageToString(config).encode())


def _remove_unused(folder: str, below: str, kept: Sequence[Any]) -> None:
    """Remove the files of this name's snapshots that are no longer shown."""
    files, root = url_to_fs(f"{folder}/{below}")
    used = {path for e in kept for path in (e.tensor_path, e.metadata_path, e.sprite.image_path)}
    names = {path.rsplit("/", maxsplit=1)[1] for path in used}
    for path in files.ls(root, detail=False):
        if path.rsplit("/", maxsplit=1)[1] not in names:
            files.rm_file(path)
