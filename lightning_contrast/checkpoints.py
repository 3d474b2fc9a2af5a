"""Checkpoints that are whole or not there: written atomically, checked before they are read, never unpickled freely."""

import os
import pickle  # for the error that torch raises; nothing is unpickled here
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from lightning_contrast._checks import fail

__all__ = ["AtomicCheckpointIO", "check_checkpoint", "latest_checkpoint", "load_checkpoint"]

_ZIP = b"PK\x03\x04"
_BEFORE_ZIP = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch < 1.6 begin
_HINT = "Go on from an earlier checkpoint; `latest_checkpoint(folder)` finds the newest whole one"
_SHARDED = (".metadata", "meta.pt")  # written last, in this order


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that a file of the given name is always whole, and reads whole ones only.

        trainer = L.Trainer(plugins=[lc.checkpoints.AtomicCheckpointIO()])

    Lightning's own writer fills a file in the folder for temporary files and moves it. Where that folder is another
    disk, as on most clusters, moving is copying: a process that is killed meanwhile leaves half a ``last.ckpt`` in the
    place of the whole one. This one writes ``.<name>.part`` beside the target, has the disk confirm it (fsync), and
    renames it; it needs no second copy of the checkpoint in memory. A ``.part`` file of a killed run is overwritten
    when the resumed run comes to the same checkpoint. Remote folders (``s3://``) are left to Lightning.

    A damaged checkpoint is refused with its path; torch itself sees missing parts only, and reads changed ones without
    a word. If it is the one that ``ckpt_path="last"`` chose (any that is called ``last...``), the newest whole one in
    its folder takes its place, with a warning. Files are read with ``weights_only=True`` unless the Trainer is told
    otherwise. FSDP and ModelParallel read their files themselves: choose with `latest_checkpoint` there.

    Raises:
        OSError: If the disk refuses, for example because it is full. The message names the checkpoint; those before it
            stay whole, and no half of the new one is left over.
        ValueError: If a checkpoint to read is damaged.
        pickle.UnpicklingError: If it asks for objects that only unpickling would make.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, all of it or nothing.

        Args:
            checkpoint: What `torch.save` takes.
            path: Where to; a file that is there is replaced.
            storage_options: None, as Lightning's own writer has it.
        """
        local = _local_path(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        part = local.with_name(f".{local.name}.part")  # does not end in .ckpt: nobody takes it for a checkpoint
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                writer = _Writer(file)
                try:
                    torch.save(checkpoint, writer)  # type: ignore[arg-type]  # all that torch calls of a file
                except RuntimeError as error:
                    if writer.error is None:
                        raise
                    raise writer.error from error  # torch says "unexpected pos" for a full disk
                file.flush()
                os.fsync(file.fileno())
            part.replace(local)
            _sync_folder(local.parent)
        except OSError as error:
            what = f"Cannot write the checkpoint {local}: {error.strerror or error}."
            hint = "Checkpoints before it are whole: make room, or write elsewhere, and go on from the last one."
            raise OSError(error.errno, f"{what} {hint}") from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a whole checkpoint.

        Args:
            path: The file. If it is damaged and its name begins with "last", the newest whole one beside it is read.
            map_location: As `torch.load` takes it.
            weights_only: None means True.
        """
        weights_only = True if weights_only is None else weights_only
        local = _local_path(path)
        if local is None:
            return super().load_checkpoint(str(path), map_location, weights_only)
        damage = _damage(local) if local.exists() else None
        if damage is not None and local.name.startswith("last"):
            earlier = latest_checkpoint(local.parent)
            if earlier is not None:
                rank_zero_warn(f"The checkpoint {local} {damage}. The run goes on from {earlier} instead.")
                local = earlier
        checkpoint: dict[str, Any] = load_checkpoint(local, map_location=map_location, weights_only=weights_only)
        return checkpoint


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest whole checkpoint in a folder and the folders in it, None where there is none.

        trainer.fit(model, data, ckpt_path=lc.checkpoints.latest_checkpoint("runs"))

    starts a new run or goes on with one, whatever it was stopped by. Newest is by the time of writing, as for
    ``ckpt_path="last"``; but all ``*.ckpt`` count, and damaged ones are left out, each with a warning.

    Args:
        folder: Where to look. It may be missing.
    """
    found = [path for path in Path(folder).rglob("*.ckpt") if path.exists() and not path.name.startswith(".")]
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        damage = _damage(path)
        if damage is None:
            return path
        rank_zero_warn(f"The checkpoint {path} {damage}. It is left out.")
    return None


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Raise unless a checkpoint is whole and holds only what may be read with ``weights_only=True``.

    Reads the whole file once. Worth a call where something else will load the file, such as FSDP, which unpickles a
    full checkpoint whatever ``weights_only`` says. Of a sharded one (a folder) only ``meta.pt`` is looked into.

    Args:
        path: A file, or the folder of a sharded checkpoint.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
        pickle.UnpicklingError: If it asks for other objects than tensors and plain values.
    """
    path = Path(path)
    _check_whole(path)
    _load(path / _SHARDED[-1] if path.is_dir() else path, map_location="meta", weights_only=True)  # no tensor is read


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    map_location: Any = "cpu",
    weights_only: bool = True,
    mmap: bool = False,
) -> Any:
    """Load a file that `torch.save` wrote, if it is whole.

    Args:
        path: The file.
        map_location: As `torch.load` takes it.
        weights_only: False unpickles whatever the file asks for, which may run any code: for files of your own.
        mmap: Map tensors into memory in the place of reading them.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
        pickle.UnpicklingError: If it asks for other objects than tensors and plain values.
    """
    _check_whole(Path(path))
    return _load(path, map_location=map_location, weights_only=weights_only, mmap=mmap)


class _Writer:
    """Passes on what torch writes, and keeps the disk's own error, which torch hides behind one of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _local_path(path: str | os.PathLike[str]) -> Path | None:
    """Return a path on this machine, or None for one that is elsewhere."""
    filesystem, name = url_to_fs(str(path))
    return Path(name) if isinstance(filesystem, LocalFileSystem) else None


def _sync_folder(folder: Path) -> None:
    """Have the disk confirm a rename; some file systems, and Windows, cannot be asked to."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:
        return
    finally:
        os.close(number)


def _damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, as the words after its path, or None for a whole one."""
    if path.is_dir():
        missing = [name for name in _SHARDED if not (path / name).is_file()]
        if missing:
            return f"lacks {missing[0]}: it was cut off while it was written"
        return _damage(path / _SHARDED[-1])
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_BEFORE_ZIP))
    if start == _BEFORE_ZIP:
        return None  # has no checksums
    if not start.startswith(_ZIP):
        return f"is empty ({size} bytes)" if not start.strip(b"\0") else "is not a file that `torch.save` writes"
    try:
        with zipfile.ZipFile(path) as archive:
            # Without checksums of torch's the structure has to do.
            bad = archive.testzip() if torch.serialization.get_crc32_options() else None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        return f"was cut off while it was written ({size} bytes; {str(error) or type(error).__name__})"
    return None if bad is None else f"was changed after it was written: the checksum of {bad} does not match"


def _check_whole(path: Path) -> None:
    if not path.exists():
        fail("checkpoint", "be an existing file", str(path), "Give the path of a `.ckpt` file", FileNotFoundError)
    damage = _damage(path)
    if damage is not None:
        raise ValueError(f"`checkpoint` must be whole, but {path} {damage}. {_HINT}.")


def _load(path: str | os.PathLike[str], **options: Any) -> Any:
    """Load a file, with errors that name it."""
    try:
        return torch.load(path, **options)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it asks for {wanted[1]})" if wanted else ""
        raise pickle.UnpicklingError(
            f"The checkpoint {path} holds more than tensors and plain values{what}, and to make it could run any code. "
            "It is not loaded. Load it with `weights_only=False` only if you wrote it yourself."
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"`checkpoint` must be a file of `torch.save`, but {path} is not: {error} {_HINT}.") from error
