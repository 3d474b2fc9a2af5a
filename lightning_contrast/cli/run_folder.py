"""What ``fit`` leaves in the folder of a run, and the checkpoint of an interrupted run."""

import csv
import importlib.metadata
import json
import platform
import shlex
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch.utils._pytree import tree_leaves

from lightning_contrast._version import __version__
from lightning_contrast.callbacks import ViewAugmentation, ViewLogger
from lightning_contrast.callbacks.reporting import FOLDER
from lightning_contrast.evaluation.feature_pass.fingerprint import data_digest

INTERRUPTED = "interrupted.ckpt"
"""Name of the checkpoint of an interrupted run, in the folder of the others."""
METRICS = "metrics.csv"
_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "timm", "kornia", "lightly", "numpy", "jsonargparse")


class RunFolder(Checkpoint):
    """Write environment, data fingerprint, metrics and a picture of the views to the folder of the run.

    LightningCLI writes ``config.yaml`` to the same folder, `Trainer.log_dir`. Rank 0 adds, in ``fit``:

    - ``environment.json``: command, time, versions, processor, accelerators, strategy and precision.
    - ``data.json``: class, number of items and digest of each training and validation set. Two digests are equal if
      images in memory, or the paths, sizes and times of the files, are; see `data_digest`. None for sets without
      a length.
    - ``metrics.csv``: ``Trainer.callback_metrics`` after each epoch, one row each with ``epoch`` and ``step``.
    - ``pictures/``: the first images and their views, by `ViewLogger`, if there is a `ViewAugmentation`.

    Ctrl-C (SIGINT) on a run of one process: the optimizer step in progress is completed, a checkpoint
    ``interrupted.ckpt`` is written to the folder of the others, from which ``--ckpt_path last`` continues, and the run
    ends. A second Ctrl-C ends it at once. Runs of several processes end at once: their ranks may be at different
    batches.

    Nothing is recomputed and no random number is drawn. As a `Checkpoint`, Lightning runs it after all callbacks that
    are none: its checkpoint holds their state after the batch.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._interrupted = False
        self._step = 0
        self._handler: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write the environment, before the data are read."""
        if stage == "fit" and trainer.is_global_zero:
            folder = _folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "environment.json", environment(trainer))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wait for an interrupt."""
        single = trainer.world_size == 1 and threading.current_thread() is threading.main_thread()
        if single and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._on_signal)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the fingerprint of the data, and read the metrics of a run that continues in its folder."""
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self._rows = _rows_before(_folder(trainer) / METRICS, trainer.current_epoch) if self._step else []
            loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders}
            found = {name: [_about(loader) for loader in _leaves(value)] for name, value in loaders.items()}
            _write(_folder(trainer) / "data.json", found)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the metrics of the epoch before, which are complete now."""
        self._write_metrics(trainer, trainer.current_epoch - 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After Ctrl-C and an optimizer step: write a checkpoint and end the run.

        Raises:
            KeyboardInterrupt: If there was one.
        """
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if self._interrupted and stepped:  # gradients that are being accumulated are not part of a checkpoint
            path = _checkpoint_folder(trainer) / INTERRUPTED
            trainer.save_checkpoint(path)
            rank_zero_info(
                f"Interrupted after {trainer.global_step} steps: wrote {path}. `--ckpt_path last` continues."
            )
            raise KeyboardInterrupt

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the metrics of the last epoch."""
        self._write_metrics(trainer, trainer.current_epoch - 1)
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the handling of Ctrl-C."""
        self._restore()

    def _restore(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        self._restore()  # the next one ends the run at once
        sys.stderr.write("\nInterrupted: writing a checkpoint after this step. Press Ctrl-C again to end at once.\n")

    def _write_metrics(self, trainer: Any, epoch: int) -> None:
        if not trainer.is_global_zero or epoch < 0 or not trainer.callback_metrics:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {"epoch": epoch, "step": trainer.global_step, **values}
        if self._rows and self._rows[-1]["epoch"] == epoch:
            self._rows.pop()
        self._rows.append(row)
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        with (_folder(trainer) / METRICS).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self._rows)


class _ViewPicture(ViewLogger):
    """Logs the first views without a state: checkpoints are those of the recipe's callbacks."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


def add_run_folder(trainer: Any) -> None:
    """Add `RunFolder`, and a `ViewLogger` if there are views and none of the user's, to the callbacks of a Trainer.

    Args:
        trainer: The Trainer, before ``fit``. With ``fast_dev_run`` it stays as it is.
    """
    if trainer.fast_dev_run:
        return
    has = [isinstance(callback, ViewAugmentation | ViewLogger) for callback in trainer.callbacks]
    has_logger = any(isinstance(callback, ViewLogger) for callback in trainer.callbacks)
    if any(has) and not has_logger:
        trainer.callbacks.append(_ViewPicture(every_n_epochs=None, png_dir=_folder(trainer) / FOLDER))
    trainer.callbacks.append(RunFolder())


def environment(trainer: Any) -> dict[str, Any]:
    """Return command, time, versions and machine of a run, as values that JSON can hold.

    Args:
        trainer: The Trainer of the run.
    """
    versions = {"python": platform.python_version(), "lightning_contrast": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(Path.cwd()),
        "versions": versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "strategy": type(trainer.strategy).__name__,
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def _leaves(loaders: Any) -> list[Any]:
    """Return the loaders of a loader, a collection or a `CombinedLoader`."""
    loaders = getattr(loaders, "iterables", loaders)
    return [loader for loader in tree_leaves(loaders) if loader is not None]


def _about(loader: Any) -> dict[str, Any]:
    dataset = getattr(loader, "dataset", loader)
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset) > 0
    return {
        "dataset": type(dataset).__qualname__,
        "items": len(dataset) if sized else None,
        "digest": data_digest(dataset, range(len(dataset))) if sized else None,
    }


def _folder(trainer: Any) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir)


def _rows_before(path: Path, epoch: int) -> list[dict[str, Any]]:
    """Return the rows of the epochs before one, if there is a file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]
    return [{**row, "epoch": int(row["epoch"])} for row in rows if int(row["epoch"]) < epoch]


def _checkpoint_folder(trainer: Any) -> Path:
    found = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(found) if found else _folder(trainer) / "checkpoints"


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
