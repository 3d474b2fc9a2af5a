"""The events of a Trainer, which tell its profiler what it does, read beside the profiler as categories of work."""

from collections.abc import Callable
from typing import Any

from lightning_contrast.callbacks.throughput.timer import Ledger

DATA, VIEWS, NETWORK, OPTIMIZER, PLUGINS, TRAINER = "data", "views", "network", "optimizer", "plugins", "trainer"
CATEGORIES = (DATA, VIEWS, NETWORK, OPTIMIZER, PLUGINS, TRAINER)
OUTSIDE = "outside"
"""Validation, and what belongs to it."""

STEP = "run_training_batch"
_NEXT_BATCH, _EPOCH = ".train_dataloader_next", "run_training_epoch"
_BY_HOOK = {
    "batch_to_device": DATA,
    "on_before_batch_transfer": DATA,
    "on_after_batch_transfer": VIEWS,
    "training_step": NETWORK,
    "backward": NETWORK,
    "optimizer_step": OPTIMIZER,
    "optimizer_zero_grad": OPTIMIZER,
    "configure_gradient_clipping": OPTIMIZER,
    "lr_scheduler_step": OPTIMIZER,
}
_BASES = ("Callback", "LightningModule", "ModelHooks", "DataHooks", "CheckpointHooks")
_CALLBACK, _MODULE = "[Callback]", "[LightningModule]"
_ATTRIBUTES = ("start", "stop")


class Events:
    """Follows a Trainer from event to event and tells a `Ledger` which category of work is current.

    A category's time is its own: what happens inside an event and belongs to another category counts there.
    The profiler stays the one that the Trainer has: two attributes of the object lie before its methods, and call them.

    Args:
        trainer: The Trainer, while it fits.
        ledger: What is told.
        images: Returns the images of the step that has just ended, 0 where there was none.
        around_step: Called with True before a step and with False after it.
    """

    def __init__(
        self, trainer: Any, ledger: Ledger, images: Callable[[], int], around_step: Callable[[bool], None]
    ) -> None:
        self.ledger = ledger
        self._trainer, self._images, self._around_step = trainer, images, around_step
        self._profiler = trainer.profiler
        self._kept = {name: vars(self._profiler)[name] for name in _ATTRIBUTES if name in vars(self._profiler)}
        self._start, self._stop = self._profiler.start, self._profiler.stop
        self._training = type(trainer.state.stage).TRAINING
        self._categories: dict[str, str | None] = {}
        self._open: list[tuple[str, str]] = []

    def open(self) -> None:
        """Listen from now on."""
        self._profiler.start, self._profiler.stop = self._on_start, self._on_stop
        self.ledger.switch(TRAINER)

    def close(self) -> None:
        """Leave the profiler as it was."""
        for name in _ATTRIBUTES:
            vars(self._profiler).pop(name, None)
        vars(self._profiler).update(self._kept)

    def enter(self, category: str) -> None:
        """Spend time on a category that has no event of its own, until `leave`."""
        if self._is_training():
            self._open.append(("", category))
            self.ledger.switch(category)

    def leave(self) -> None:
        """Go back to what was current."""
        self._close("")

    def _is_training(self) -> bool:
        return self._trainer.state.stage is self._training

    def _on_start(self, name: str) -> None:
        self._start(name)
        if not self._is_training():
            self.ledger.switch(OUTSIDE)
            return
        if name not in self._categories:
            self._categories[name] = self._category_of(name)
        category = self._categories[name]
        if name.endswith(_NEXT_BATCH):
            self.ledger.close_step(self._images())
        elif name == STEP:
            self._around_step(True)
        if category is not None:
            self._open.append((name, category))
            self.ledger.switch(category)
        elif self.ledger.current == OUTSIDE:
            self.ledger.switch(self._enclosing())
        if name == _EPOCH:
            self.ledger.switch(DATA)  # until the next event: the workers of the loader start

    def _on_stop(self, name: str) -> None:
        if name == STEP:
            self._around_step(False)
        if self._categories.get(name) is not None:
            self._close(name)
        self._stop(name)

    def _close(self, name: str) -> None:
        if self._open and self._open[-1][0] == name:
            self._open.pop()
            self.ledger.switch(self._enclosing() if self._is_training() else OUTSIDE)

    def _enclosing(self) -> str:
        return self._open[-1][1] if self._open else TRAINER

    def _category_of(self, name: str) -> str | None:
        """Return the category of an event, None where it is that of the event around it."""
        owner, _, hook = name.rpartition(".")
        if owner.startswith(_CALLBACK):
            key = owner.removeprefix(_CALLBACK)
            found = [c for c in self._trainer.callbacks if c.state_key == key and _has_own(c, hook)]
            return f"{PLUGINS}/{type(found[0]).__name__}" if found else None
        if name.endswith(_NEXT_BATCH):
            return DATA
        if hook in _BY_HOOK:
            return _BY_HOOK[hook]
        own = owner.startswith(_MODULE) and hook.startswith("on_") and _has_own(self._trainer.lightning_module, hook)
        return NETWORK if own else None


def _has_own(owner: Any, hook: str) -> bool:
    """Tell whether a callback or module does anything in a hook."""
    if hook in vars(owner):
        return True
    function = getattr(type(owner), hook, None)
    return getattr(function, "__qualname__", "").split(".")[0] not in _BASES
