"""The floating point operations of one step, counted while the step is made."""

import sys
from typing import Any

from torch.utils.flop_counter import FlopCounterMode


class _NoModules:
    """Stands for the counter's tracker of modules, which would hook every module and tensor of the process."""

    parents = ("Global",)

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *_: object) -> None:
        """Do nothing."""


class StepFlops:
    """Counts with `torch.utils.flop_counter` what runs between `begin` and `end`: no operation more, none less.

    The counter reads the shapes of the operations of the real step, so nothing is computed twice and no random number
    is drawn. Counted are matrix products, convolutions and attention, a multiplication and an addition as two; what a
    checkpointed layer computes again counts again.
    """

    def __init__(self) -> None:
        self._mode: Any = None

    def begin(self) -> bool:
        """Begin to count, and tell whether that is possible: compiled code would not run compiled under a counter."""
        if _compiles():
            return False
        self._mode = FlopCounterMode(display=False)
        self._mode.mod_tracker = _NoModules()
        self._mode.__enter__()
        return True

    def end(self) -> int:
        """Return the operations since `begin`; 0 where nothing was counted."""
        mode, self._mode = self._mode, None
        if mode is None:
            return 0
        mode.__exit__(None, None, None)
        return int(mode.get_total_flops())


def _compiles() -> bool:
    """Tell whether anything in this process was given to ``torch.compile``."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    backends: dict[int, Any] = getattr(frames, "cached_backends", {})
    return any(backend is not None for backend in backends.values())  # None: of code that must not be compiled
