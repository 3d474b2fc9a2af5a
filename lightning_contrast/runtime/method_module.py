"""Lightning integration of the methods: default callbacks, sharding, hyperparameters, resumed schedules."""

import inspect
from collections.abc import Sequence
from types import FrameType
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_contrast.runtime.default_callbacks import mark_defaults, missing_defaults
from lightning_contrast.runtime.fsdp import ShardedClippingModule, has_local_batchnorm, shard_submodules
from lightning_contrast.runtime.hparams import caller, check_complete, left_out_arguments, settings_as_dicts
from lightning_contrast.runtime.last_batch import check_last_batch
from lightning_contrast.runtime.run_length import EpochScheduledModule


class MethodModule(ShardedClippingModule, EpochScheduledModule):
    """A LightningModule that adds its default callbacks, shards itself, and saves plain hyperparameters."""

    sharded_methods: ClassVar[dict[str, Sequence[str]]] = {}
    """Methods other than ``forward`` that a step calls, by the name of the submodule that has them."""
    _default_callbacks: list[L.Callback] | None = None

    def __init__(self) -> None:
        super().__init__()
        check_complete(inspect.currentframe())

    def default_callbacks(self) -> list[L.Callback]:
        """Return new instances of the callbacks that the algorithm needs."""
        return []

    def configure_callbacks(self) -> list[L.Callback]:
        """Add default callbacks that the Trainer lacks."""
        if self._default_callbacks is None:  # kept, since a new instance at a second fit would lose its state
            self._default_callbacks = mark_defaults(self.default_callbacks(), self)
        return missing_defaults(self._default_callbacks, self.trainer.callbacks, self)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Shard the submodules under FSDP2; every other strategy wraps the whole module itself."""
        if self.device_mesh is not None:
            shard_submodules(self, self.device_mesh, self.sharded_methods)

    def on_fit_start(self) -> None:
        """Warn once if several ranks keep BatchNorm statistics of their own."""
        if self.trainer.world_size > 1 and has_local_batchnorm(self):
            rank_zero_warn("BatchNorm statistics differ between ranks; set `sync_batchnorm=True` on the Trainer.")

    def on_train_start(self) -> None:
        """Check what is known of the last batch of an epoch."""
        super().on_train_start()
        check_last_batch(self.trainer)

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Save the constructor's plain arguments, and dataclasses as dicts; modules would need unsafe unpickling.

        Instead of a module or a callable, a note is saved, so that `load_from_checkpoint` asks for the argument.
        """
        frame = frame or caller(inspect.currentframe())
        ignored = [ignore] if isinstance(ignore, str) else list(ignore or ())
        left_out, settings = left_out_arguments(frame), settings_as_dicts(frame)
        super().save_hyperparameters(*args, ignore=[*ignored, *left_out], frame=frame, logger=logger)
        notes = {name: note for name, note in left_out.items() if note is not None and name not in ignored}
        self.hparams.update(notes | settings)
