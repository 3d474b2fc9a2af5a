"""Callback that writes the output of ``predict`` to a file."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_contrast._checks import fail
from lightning_contrast.contracts import batch_labels
from lightning_contrast.evaluation.feature_pass.fingerprint import row_paths

Columns: TypeAlias = dict[str, np.ndarray[Any, Any]]


class FeatureWriter(BasePredictionWriter):
    """Writes predicted features, and the labels and paths of their images, to ``features.npz``.

    The file is written to the folder of the run (`Trainer.log_dir`) at the end of prediction, by rank 0 for all ranks;
    with several loaders one file is written for each, ``features_0.npz`` and so on. ``numpy.load`` reads it:

    - ``features``: ``(N, ...)`` float32; the tensor returned by ``predict_step``, or entry ``"features"`` of a dict.
    - ``labels``: ``(N,)``, if the batches hold labels.
    - ``indices``: ``(N,)`` int64, the position of each row in the dataset, if it has positions; rows are sorted by it.
    - ``paths``: ``(N,)`` str, if the dataset has ``paths`` or, as torchvision's folders, ``samples``.

    A ``predict_step`` that returns None writes its results itself and is left alone.

    Raises:
        TypeError: If ``predict_step`` returns something else.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._batches: dict[int, list[Columns]] = defaultdict(list)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the features of a batch in host memory."""
        if prediction is None:
            return
        features = prediction.get("features") if isinstance(prediction, Mapping) else prediction
        if not isinstance(features, Tensor) or features.ndim == 0:
            hint = "Return one row per image"
            fail("predict_step", "return features (B, F)", type(prediction).__name__, hint, TypeError)
        columns = {"features": features.detach().float().cpu().numpy()}
        labels = batch_labels(batch)
        if labels is not None and len(labels) == len(features):
            columns["labels"] = labels.detach().cpu().numpy()
        if batch_indices is not None and len(batch_indices) == len(features):
            columns["indices"] = np.asarray(batch_indices, dtype=np.int64)
            paths = row_paths(_dataset(trainer, dataloader_idx), batch_indices)
            if paths is not None:
                columns["paths"] = np.asarray(paths)
        self._batches[dataloader_idx].append(columns)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        batches, self._batches = self._batches, defaultdict(list)
        ranks: list[Any] = [dict(batches)]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, dict(batches))
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        for loader in sorted(set().union(*ranks)):
            if trainer.is_global_zero:
                columns = _joined([columns for rank in ranks for columns in rank.get(loader, [])])
                name = "features.npz" if trainer.num_predict_batches[1:] == [] else f"features_{loader}.npz"
                folder.mkdir(parents=True, exist_ok=True)
                np.savez(folder / name, **columns)  # type: ignore[arg-type]  # keywords are arrays
                weights = (
                    f"checkpoint {trainer.ckpt_path}" if trainer.ckpt_path else "the model as built, no --ckpt_path"
                )
                shape = " x ".join(map(str, columns["features"].shape))
                rank_zero_info(f"Wrote {shape} features ({weights}) to {folder / name}: {', '.join(columns)}.")


def _joined(batches: list[Columns]) -> Columns:
    """Join the batches of all ranks, in the order of the dataset; keep the columns that all of them have."""
    names = [name for name in batches[0] if all(name in columns for columns in batches)]
    columns = {name: np.concatenate([columns[name] for columns in batches]) for name in names}
    if "indices" not in columns:
        return columns
    _, rows = np.unique(columns["indices"], return_index=True)  # a sampler may repeat rows
    return {name: column[rows] for name, column in columns.items()}


def _dataset(trainer: L.Trainer, loader: int) -> Any:
    loaders = trainer.predict_dataloaders
    return getattr(loaders[loader] if isinstance(loaders, list | tuple) else loaders, "dataset", None)
