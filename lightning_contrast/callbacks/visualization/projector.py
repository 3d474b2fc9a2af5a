"""Snapshots of embeddings for TensorBoard's projector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from lightning_contrast.callbacks.reporting import write_file
from lightning_contrast.callbacks.visualization.sample import Sample

CONFIG = "projector_config.pbtxt"
"""File that lists the embeddings of a run; TensorBoard defines its name."""


def summary_writers(trainer: Any) -> list[Any]:
    """Return the `SummaryWriter` of each TensorBoard logger of a Trainer."""
    experiments: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    writers = [e for e in experiments if hasattr(e, "get_logdir") and hasattr(e, "add_embedding")]
    return [w for w in writers if isinstance(w.get_logdir(), str | Path)]  # with `fast_dev_run` there is no folder


def add_snapshot(
    writer: Any, tag: str, step: int, sample: Sample, class_words: Sequence[str] | None, *, keep: int
) -> None:
    """Add a snapshot with `SummaryWriter.add_embedding`, and remove the oldest ones but the first.

    ``add_embedding`` never removes files and lists the snapshots of one writer only. Here the number of snapshots is
    bounded, a step that is written again replaces the earlier snapshot, and entries of earlier writers in the same
    folder are kept.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        tag: Name of the embeddings; snapshots are listed as ``<tag>:<step>``.
        step: Number of optimizer steps.
        sample: Images and features.
        class_words: Class name of each image, ``N`` strings; None without labels.
        keep: Maximum number of snapshots of this tag, >= 2: the first and the newest.
    """
    folder = str(writer.get_logdir())
    entries = {entry.tensor_name: entry for entry in _read_config(folder).embeddings}
    name = f"{tag}:{step:05d}"
    if name in entries:
        _remove(folder, entries.pop(name))
    metadata: list[Any] = [str(i) for i in range(len(sample.ids))]
    if class_words is not None:
        metadata = [[" ".join(word.split()), i] for i, word in enumerate(class_words)]
    writer.add_embedding(
        sample.features,
        metadata=metadata,
        # The writer truncates 255 x values to integers.
        label_img=(sample.pictures.double() + 0.5) / 255,
        global_step=step,
        tag=tag,
        metadata_header=None if class_words is None else ["label", "image"],
    )
    entries |= {entry.tensor_name: entry for entry in _read_config(folder).embeddings if entry.tensor_name == name}
    steps = {n: n.removeprefix(f"{tag}:") for n in entries if n.startswith(f"{tag}:")}
    own = sorted((n for n, digits in steps.items() if digits.isdigit()), key=lambda n: int(steps[n]))
    for dropped in own[1 : max(1, len(own) - keep + 1)]:
        _remove(folder, entries.pop(dropped))
    _write_config(folder, list(entries.values()))


def _read_config(folder: str) -> Any:
    """Return the projector configuration of a run, empty if there is none."""
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    files, root = url_to_fs(folder)
    config = ProjectorConfig()
    if files.exists(f"{root}/{CONFIG}"):
        text_format.Parse(files.cat_file(f"{root}/{CONFIG}").decode(), config)
    return config


def _write_config(folder: str, entries: Sequence[Any]) -> None:
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    write_file(folder, CONFIG, text_format.MessageToString(ProjectorConfig(embeddings=entries)).encode())


def _remove(folder: str, entry: Any) -> None:
    """Remove the files of a snapshot."""
    files, root = url_to_fs(folder)
    snapshot = f"{root}/{entry.tensor_path.rpartition('/')[0]}"
    if files.exists(snapshot):
        files.rm(snapshot, recursive=True)
        parent = snapshot.rpartition("/")[0]
        if not files.ls(parent):
            files.rmdir(parent)
