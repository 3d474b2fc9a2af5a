"""Categories of the work of a Trainer, derived from the events that it sends to its profiler."""

from collections.abc import Callable
from typing import Any

from lightning_contrast.callbacks.throughput.timer import StepTimer

DATA, VIEWS, NETWORK, OPTIMIZER, CALLBACKS, TRAINER = "data", "views", "network", "optimizer", "callbacks", "trainer"
CATEGORIES = (DATA, VIEWS, NETWORK, OPTIMIZER, CALLBACKS, TRAINER)
OUTSIDE = "outside"
"""Category of validation, which is not reported."""

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
_PATCHED = ("start", "stop")


class ProfilerListener:
    """Switches the category of a `StepTimer` at the events that a Trainer sends to its profiler.

    Nested events are exclusive: time inside an event that belongs to another category is counted there only. The
    profiler of the Trainer stays in use; its ``start`` and ``stop`` are wrapped by instance attributes.

    Args:
        trainer: The Trainer, during ``fit``.
        step_timer: Timer whose category is switched.
        take_images: Returns the number of images of the last step, 0 if there was none.
        around_step: Called with True before each step and with False after it.
    """

    def __init__(
        self, trainer: Any, step_timer: StepTimer, take_images: Callable[[], int], around_step: Callable[[bool], None]
    ) -> None:
        self.step_timer = step_timer
        self._trainer, self._take_images, self._around_step = trainer, take_images, around_step
        self._profiler = trainer.profiler
        self._previous = {name: vars(self._profiler)[name] for name in _PATCHED if name in vars(self._profiler)}
        self._start, self._stop = self._profiler.start, self._profiler.stop
        self._training = type(trainer.state.stage).TRAINING
        self._categories: dict[str, str | None] = {}
        self._stack: list[tuple[str, str]] = []

    def attach(self) -> None:
        """Wrap the methods of the profiler."""
        self._profiler.start, self._profiler.stop = self._on_start, self._on_stop
        self.step_timer.switch(TRAINER)

    def detach(self) -> None:
        """Restore the methods of the profiler."""
        for name in _PATCHED:
            vars(self._profiler).pop(name, None)
        vars(self._profiler).update(self._previous)

    def enter(self, category: str) -> None:
        """Start work that has no event of its own."""
        if self._is_training():
            self._stack.append(("", category))
            self.step_timer.switch(category)

    def leave(self) -> None:
        """End the work started by `enter`."""
        self._pop("")

    def _is_training(self) -> bool:
        return self._trainer.state.stage is self._training

    def _on_start(self, name: str) -> None:
        self._start(name)
        if not self._is_training():
            self.step_timer.switch(OUTSIDE)
            return
        if name not in self._categories:
            self._categories[name] = self._category_of(name)
        category = self._categories[name]
        if name.endswith(_NEXT_BATCH):
            self.step_timer.end_step(self._take_images())
        elif name == STEP:
            self._around_step(True)
        if category is not None:
            self._stack.append((name, category))
            self.step_timer.switch(category)
        elif self.step_timer.active == OUTSIDE:
            self.step_timer.switch(self._enclosing())
        if name == _EPOCH:
            self.step_timer.switch(DATA)  # until the next event: the workers of the loader start

    def _on_stop(self, name: str) -> None:
        if name == STEP:
            self._around_step(False)
        if self._categories.get(name) is not None:
            self._pop(name)
        self._stop(name)

    def _pop(self, name: str) -> None:
        if self._stack and self._stack[-1][0] == name:
            self._stack.pop()
            self.step_timer.switch(self._enclosing() if self._is_training() else OUTSIDE)

    def _enclosing(self) -> str:
        return self._stack[-1][1] if self._stack else TRAINER

    def _category_of(self, name: str) -> str | None:
        """Return the category of an event, None if it is part of the enclosing one."""
        owner, _, hook = name.rpartition(".")
        if owner.startswith(_CALLBACK):
            key = owner.removeprefix(_CALLBACK)
            found = [c for c in self._trainer.callbacks if c.state_key == key and _overrides(c, hook)]
            return f"{CALLBACKS}/{type(found[0]).__name__}" if found else None
        if name.endswith(_NEXT_BATCH):
            return DATA
        if hook in _BY_HOOK:
            return _BY_HOOK[hook]
        own = owner.startswith(_MODULE) and hook.startswith("on_") and _overrides(self._trainer.lightning_module, hook)
        return NETWORK if own else None


def _overrides(owner: Any, hook: str) -> bool:
    """Return whether a callback or module overrides a hook of its base class."""
    if hook in vars(owner):
        return True
    function = getattr(type(owner), hook, None)
    return getattr(function, "__qualname__", "").split(".")[0] not in _BASES
