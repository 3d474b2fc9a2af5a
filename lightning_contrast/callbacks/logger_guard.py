"""A guard that keeps a run going when what it is logged to fails."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeAlias

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_contrast._checks import check_choice

Action: TypeAlias = Literal["continue", "raise"]
_CALLS = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")


class LoggerGuard(Callback):
    """Trains on where a logger fails, say because its server is away, or names the logger that ended the run.

    The calls that the Trainer makes of its loggers are guarded from `setup` until they are finalised. The first failure
    of each logger is told at once, with its cause; their number at the end. What a failed call would have logged is
    lost, but the logger is called again the next time. A logger that fails while a run ends for another reason does not
    hide that reason. Works with any logger, and with several. What a module does with ``logger.experiment`` itself, and
    a logger that cannot even be set up, are not guarded.

    Args:
        action: "continue" without the call that failed, or "raise" an error that names the logger, the call, the step.

    Attributes:
        failures: How many calls of each logger failed so far, by its class name.

    Raises:
        RuntimeError: In the run, for ``action="raise"``.
        ValueError: If the action is none of those.
    """

    def __init__(self, action: Action = "continue") -> None:
        check_choice("action", action, ("continue", "raise"))
        self.action = action
        self.failures: dict[str, int] = {}
        self._is_failing = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Guard the calls of each logger."""
        self._is_failing = False
        for logger in trainer.loggers:
            _release(logger)
            for name in _CALLS:
                if callable(getattr(logger, name, None)):
                    setattr(logger, name, self._guard(trainer, logger, name))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell how many calls failed."""
        self._tell()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell how many calls failed; from now on no failure may hide the exception."""
        self._is_failing = True
        self._tell()

    def _guard(self, trainer: Trainer, logger: Any, name: str) -> Callable[..., Any]:
        inner, kind = getattr(logger, name), type(logger).__name__

        @wraps(inner)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            except Exception as error:
                what = f"The logger {kind} failed in `{name}` at step {trainer.global_step}: {error!r}."
                if self.action == "raise" and not self._is_failing:
                    hint = "`LoggerGuard('continue')` trains on without it."
                    raise RuntimeError(f"{what} {hint}") from error
                self.failures[kind] = self.failures.get(kind, 0) + 1
                if self.failures[kind] == 1:
                    rank_zero_warn(f"{what} The run goes on; further failures are counted.", category=RuntimeWarning)
                return None
            finally:
                if name == "finalize":  # the last call of a run
                    _release(logger)

        return guarded

    def _tell(self) -> None:
        if self.failures:
            counts = ", ".join(f"{kind} {count}" for kind, count in self.failures.items())
            rank_zero_warn(f"Calls of loggers that failed: {counts}.", category=RuntimeWarning)


def _release(logger: Any) -> None:
    """Leave a logger as it was."""
    for name in _CALLS:
        vars(logger).pop(name, None)
