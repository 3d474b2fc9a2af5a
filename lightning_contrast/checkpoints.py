"""Atomic checkpoint IO, integrity checks and safe loading."""

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
_BEFORE_ZIP = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of files of torch < 1.6
_HINT = "Resume from an earlier checkpoint; `latest_checkpoint(folder)` finds the newest intact one"
_SHARDED = (".metadata", "meta.pt")  # written last, in this order


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically and verify them when they are read.

        trainer = L.Trainer(plugins=[lc.checkpoints.AtomicCheckpointIO()])

    Lightning's default writer writes to the folder for temporary files and moves the result. If that folder is on
    another disk, as on most clusters, moving means copying: a process killed during the copy leaves an incomplete
    ``last.ckpt`` in place of the previous one. This class writes ``.<name>.part`` to the target folder, calls fsync and
    renames the file; it needs no second copy of the checkpoint in memory. A ``.part`` file left by a killed run is
    overwritten when the resumed run writes the same checkpoint. Remote folders (``s3://``) are handled by Lightning.

    A damaged checkpoint raises an error with its path; torch detects missing parts but not changed bytes. If the
    damaged file is the one chosen by ``ckpt_path="last"`` (any name beginning with ``last``), the newest intact
    checkpoint in its folder is used instead, with a warning. Files are read with ``weights_only=True`` unless the
    Trainer specifies otherwise. FSDP and ModelParallel read their files themselves: use `latest_checkpoint` with them.

    Raises:
        OSError: If writing fails, for example because the disk is full. The message names the checkpoint; earlier
            checkpoints stay intact and no partial file is left.
        ValueError: If a checkpoint to read is damaged.
        pickle.UnpicklingError: If it requires unpickling of objects other than tensors and plain values.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint atomically.

        Args:
            checkpoint: The checkpoint, as for `torch.save`.
            path: Path of the file; an existing file is replaced.
            storage_options: Options of a remote file system, or None.
        """
        local = local_path(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        part = local.with_name(f".{local.name}.part")  # not *.ckpt, so that it is not found as a checkpoint
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                writer = _Writer(file)
                try:
                    torch.save(checkpoint, writer)  # type: ignore[arg-type]  # has the methods that torch calls
                except RuntimeError as error:
                    if writer.error is None:
                        raise
                    raise writer.error from error  # torch reports a full disk as "unexpected pos"
                file.flush()
                os.fsync(file.fileno())
            part.replace(local)
            _sync_folder(local.parent)
        except OSError as error:
            what = f"Cannot write the checkpoint {local}: {error.strerror or error}."
            hint = "Earlier checkpoints are intact: free disk space or change the folder, and resume from the last one."
            raise OSError(error.errno, f"{what} {hint}") from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint after verifying it.

        Args:
            path: Path of the file. If it is damaged and its name begins with "last", the newest intact checkpoint in
                its folder is read instead.
            map_location: As for `torch.load`.
            weights_only: As for `torch.load`; None means True.
        """
        weights_only = True if weights_only is None else weights_only
        local = local_path(path)
        if local is None:
            return super().load_checkpoint(str(path), map_location, weights_only)
        damage = _damage(local) if local.exists() else None
        if damage is not None and local.name.startswith("last"):
            earlier = latest_checkpoint(local.parent)
            if earlier is not None:
                rank_zero_warn(f"The checkpoint {local} {damage}. The run resumes from {earlier} instead.")
                local = earlier
        checkpoint: dict[str, Any] = load_checkpoint(local, map_location=map_location, weights_only=weights_only)
        return checkpoint


def latest_checkpoint(*folders: str | os.PathLike[str]) -> Path | None:
    """Return the newest intact checkpoint in folders and their subfolders, or None.

        trainer.fit(model, data, ckpt_path=lc.checkpoints.latest_checkpoint("runs"))

    starts a new run or resumes an interrupted one. Newest means the latest modification time, as for
    ``ckpt_path="last"``; all ``*.ckpt`` files are considered, and damaged ones are skipped with a warning.

    Args:
        *folders: The folders; they need not exist.
    """
    found = {path for folder in folders for path in Path(folder).rglob("*.ckpt")}
    found = {path for path in found if path.exists() and not path.name.startswith(".")}
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        damage = _damage(path)
        if damage is None:
            return path
        rank_zero_warn(f"The checkpoint {path} {damage}. It is skipped.")
    return None


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Raise unless a checkpoint is intact and loads with ``weights_only=True``.

    Reads the whole file once. Useful before other code loads the file, such as FSDP, which unpickles full checkpoints
    regardless of ``weights_only``. Of a sharded checkpoint (a folder) only ``meta.pt`` is read.

    Args:
        path: A file, or the folder of a sharded checkpoint.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is damaged.
        pickle.UnpicklingError: If it contains objects other than tensors and plain values.
    """
    path = Path(path)
    _check_whole(path)
    _load(
        path / _SHARDED[-1] if path.is_dir() else path, map_location="meta", weights_only=True
    )  # reads no tensor data


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    map_location: Any = "cpu",
    weights_only: bool = True,
    mmap: bool = False,
) -> Any:
    """Load a file written by `torch.save` after verifying it.

    Args:
        path: Path of the file.
        map_location: As for `torch.load`.
        weights_only: False unpickles arbitrary objects, which can run any code; only for files you trust.
        mmap: Map tensors into memory instead of reading them.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
        pickle.UnpicklingError: If it asks for other objects than tensors and plain values.
    """
    _check_whole(Path(path))
    return _load(path, map_location=map_location, weights_only=weights_only, mmap=mmap)


class _Writer:
    """Forwards writes to a file and keeps its OSError, which torch replaces by another error."""

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


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """Return a local path, or None for a remote one."""
    filesystem, name = url_to_fs(str(path))
    return Path(name) if isinstance(filesystem, LocalFileSystem) else None


def _sync_folder(folder: Path) -> None:
    """Call fsync on a folder after a rename; not supported by Windows and some file systems."""
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
    """Return the damage of a checkpoint, as the words after its path, or None if it is intact."""
    if path.is_dir():
        missing = [name for name in _SHARDED if not (path / name).is_file()]
        if missing:
            return f"lacks {missing[0]}: it was not written completely"
        return _damage(path / _SHARDED[-1])
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_BEFORE_ZIP))
    if start == _BEFORE_ZIP:
        return None  # without checksums
    if not start.startswith(_ZIP):
        return f"is empty ({size} bytes)" if not start.strip(b"\0") else "was not written by `torch.save`"
    try:
        with zipfile.ZipFile(path) as archive:
            # Without torch's checksums only the structure can be checked.
            bad = archive.testzip() if torch.serialization.get_crc32_options() else None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        return f"was not written completely ({size} bytes; {str(error) or type(error).__name__})"
    return None if bad is None else f"was modified after it was written: the checksum of {bad} does not match"


def _check_whole(path: Path) -> None:
    if not path.exists():
        fail("checkpoint", "be an existing file", str(path), "Give the path of a `.ckpt` file", FileNotFoundError)
    damage = _damage(path)
    if damage is not None:
        raise ValueError(f"`checkpoint` must be intact, but {path} {damage}. {_HINT}.")


def _load(path: str | os.PathLike[str], **options: Any) -> Any:
    """Load a file; errors name its path."""
    try:
        return torch.load(path, **options)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({wanted[1]})" if wanted else ""
        raise pickle.UnpicklingError(
            f"The checkpoint {path} contains objects other than tensors and plain values{what}; unpickling can run "
            "any code. Load it with `weights_only=False` only if you trust its source."
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(
            f"`checkpoint` must be written by `torch.save`, but {path} is not: {error} {_HINT}."
        ) from error
