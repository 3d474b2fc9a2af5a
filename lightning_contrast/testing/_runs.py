"""Quiet Trainer runs for the checks."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning

from lightning_contrast._checks import fail
from lightning_contrast.runtime.quiet import quiet_lightning

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(
    module: L.LightningModule,
    data: Any,
    callbacks: Sequence[L.Callback],
    folder: str | Path,
    settings: dict[str, Any],
    **options: Any,
) -> L.Trainer:
    """Fit a module and return the Trainer.

    Args:
        module: The module.
        data: A datamodule, a loader, or a pair of loaders (training, validation).
        callbacks: Callbacks of the Trainer.
        folder: Root folder of the run.
        settings: Arguments of the Trainer; they override the defaults.
        **options: Arguments of ``fit``.
    """
    with warnings.catch_warnings(), quiet_lightning():
        warnings.simplefilter("ignore", PossibleUserWarning)  # advice, such as on workers
        trainer = L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(QUIET | settings))
        if isinstance(data, tuple | list) and len(data) == 2:
            trainer.fit(module, *data, **options)
        else:
            trainer.fit(module, data, **options)
    return trainer


def make(name: str, factory: Callable[[], Any], kind: type | None = None) -> Any:
    """Call a factory and check its result.

    Args:
        name: Name of the argument.
        factory: Function without arguments.
        kind: Required type of the result; None for any.
    """
    if isinstance(factory, torch.nn.Module) or not callable(factory):
        hint = f"Give a function without arguments, such as `lambda: {type(factory).__name__}(...)`"
        fail(name, "be a function, because two runs need two objects", type(factory).__name__, hint, TypeError)
    made = factory()
    if kind is not None and not isinstance(made, kind):
        fail(name, f"return a {kind.__name__}", type(made).__name__, "Return one from the function", TypeError)
    return made


def required_arguments(fn: Callable[..., Any]) -> int:
    """Return the number of required positional arguments of a function."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(fn).parameters.values()
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
