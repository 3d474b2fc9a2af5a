"""Lightning integration of the methods: default callbacks, sharding, hyperparameters, resumed schedules."""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_contrast.nn.auxiliary_batchnorm import NAME as AUXILIARY
from lightning_contrast.nn.auxiliary_batchnorm import add_auxiliary_batchnorm
from lightning_contrast.optim.groups import follow_rates
from lightning_contrast.runtime.default_callbacks import mark_defaults, missing_defaults, of_module
from lightning_contrast.runtime.finetuning import prepare_finetuning
from lightning_contrast.runtime.fsdp import ShardedClippingModule, has_local_batchnorm, shard_submodules
from lightning_contrast.runtime.hparams import caller, check_complete, left_out_arguments, settings_as_dicts
from lightning_contrast.runtime.last_batch import check_last_batch
from lightning_contrast.runtime.learning_rate import ScheduledModule
from lightning_contrast.runtime.optimizer_steps import only_forward
from lightning_contrast.runtime.rank_draws import RestoreDraws, rank_seed
from lightning_contrast.runtime.run_length import remember_callbacks, remembered_callbacks, tell_unreached
from lightning_contrast.seeding import isolated


class MethodModule(ShardedClippingModule, ScheduledModule):
    """A LightningModule that adds its default callbacks, shards itself, and saves plain hyperparameters."""

    sharded_methods: ClassVar[dict[str, Sequence[str]]] = {}
    """Methods other than ``forward`` that a step calls, by the name of the submodule that has them."""
    _default_callbacks: list[L.Callback] | None = None

    def __init__(self) -> None:
        super().__init__()
        check_complete(inspect.currentframe())
        self.rank_draws = ExitStack()

    def default_callbacks(self) -> list[L.Callback]:
        """Return new instances of the callbacks that the algorithm needs."""
        return []

    def configure_callbacks(self) -> list[L.Callback]:
        """Add default callbacks that the Trainer lacks."""
        if self._default_callbacks is None:  # kept, since a new instance at a second fit would lose its state
            self._default_callbacks = mark_defaults(self.default_callbacks(), self)
        present = of_module(self.trainer.callbacks, self)  # type: ignore[attr-defined]
        missing = missing_defaults(self._default_callbacks, present, self)
        if self.trainer.world_size > 1:
            missing += missing_defaults(mark_defaults([RestoreDraws()], self), present, self)
        remember_callbacks(self.trainer, [*present, *missing])
        return missing

    def on_train_start(self) -> None:
        """Check the length of the last batch, restore the callbacks that the algorithm needs, and plan all schedules.

        A `Tuner` removes all callbacks for its trial runs, but without its queue or its EMA update a method is another
        one.
        """
        trainer: Any = self.trainer
        check_last_batch(trainer)
        prepare_finetuning(trainer)
        needed = tuple(type(callback) for callback in self._default_callbacks or ())
        for callback in remembered_callbacks(trainer):
            if isinstance(callback, needed) and callback not in trainer.callbacks:
                trainer.callbacks = [*trainer.callbacks, callback]
                callback.on_train_start(trainer, self)
        super().on_train_start()
        arguments = inspect.signature(type(self)).parameters
        tell_unreached(trainer, self.hparams, {name: argument.default for name, argument in arguments.items()})

    def on_train_epoch_start(self) -> None:
        """Give all parts of a group that was added to the optimizer the learning rate that a callback has set.

        Gradients are dropped before an epoch that only updates the statistics of BatchNorm: Lightning's
        `StochasticWeightAveraging` skips the backward passes of that epoch but not its optimizer step.
        """
        for optimizer in self.trainer.optimizers:
            follow_rates(optimizer)
        if only_forward(self.trainer):
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw masks, noise and dropout of the step from generators that differ between ranks; see `rank_seed`."""
        self.rank_draws.close()  # a subclass may have overridden `on_train_batch_end`
        has_seed = any(getattr(c, "provides_view_seed", None) is not None for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        seed = None if has_seed else rank_seed()
        if seed is not None:
            self.rank_draws.enter_context(isolated(seed, self.device))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Restore the generators, which are equal on all ranks after ``seed_everything``."""
        self.rank_draws.close()

    def configure_model(self) -> None:
        """Shard the submodules under FSDP2; every other strategy wraps the whole module itself."""
        if self.device_mesh is not None:
            shard_submodules(self, self.device_mesh, self.sharded_methods)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the second set of BatchNorm that a checkpoint of a run with `AdversarialView` may have."""
        if any(AUXILIARY in name.split(".") for name in checkpoint.get("state_dict", ())):
            add_auxiliary_batchnorm(self)
        super().on_load_checkpoint(checkpoint)

    def on_fit_start(self) -> None:
        """Warn once if several ranks keep BatchNorm statistics of their own."""
        if self.trainer.world_size > 1 and has_local_batchnorm(self):
            rank_zero_warn("BatchNorm statistics differ between ranks; set `sync_batchnorm=True` on the Trainer.")

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
