"""Constructor arguments of a method that a checkpoint keeps as hyperparameters."""

import dataclasses
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.parsing import collect_init_args

from lightning_contrast._checks import fail

_LEFT_OUT = ", which a checkpoint cannot hold:"


def caller(frame: FrameType | None) -> FrameType | None:
    """Return the frame that called the given one."""
    return frame.f_back if frame is not None else None


def left_out_arguments(frame: FrameType | None) -> dict[str, str | None]:
    """Return the constructor arguments that a checkpoint with ``weights_only=True`` cannot hold, such as callables.

    An argument that a LightningCLI built is not among them: the checkpoint holds its configuration.

    Args:
        frame: The frame of a constructor; arguments of subclass constructors that called it are included.

    Returns:
        By name, what the checkpoint holds instead, for `check_complete`; None for an argument that a subclass gave to
        the constructor by itself, as it will do again.
    """
    own = (_levels(frame) or [{}])[-1]
    return {
        name: f"{_described(value)}{_LEFT_OUT} pass `{name}` to `load_from_checkpoint`" if name in own else None
        for name, value in _arguments(frame).items()
        if not _is_plain(value) and not _is_configured(name)
    }


def check_complete(frame: FrameType | None) -> None:
    """Refuse to load a checkpoint without the constructor arguments that it could not hold.

    Args:
        frame: The frame of a constructor; arguments of subclass constructors that called it are included.

    Raises:
        ValueError: If an argument has the value that `left_out_arguments` gave to the checkpoint.
    """
    missing = {
        name: value.split(_LEFT_OUT)[0]
        for name, value in _arguments(frame).items()
        if isinstance(value, str) and _LEFT_OUT in value
    }
    if missing:
        names = ", ".join(f"{name}=..." for name in missing)
        hint = f"Call `load_from_checkpoint(path, {names})` with those of the run"
        fail("load_from_checkpoint", "get the arguments that a checkpoint cannot hold", missing, hint)


def _described(value: object) -> str:
    """Return the name of a function or class, or that of the class of an object."""
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else type(value).__qualname__


def settings_as_dicts(frame: FrameType | None) -> dict[str, dict[str, Any]]:
    """Return the constructor arguments that are dataclasses of plain values, such as `losses.Negatives`, as dicts.

    Constructors that take such a dataclass accept its dict too, so that it can be restored from a checkpoint. Those
    that a LightningCLI built are left out: the checkpoint holds their configuration.

    Args:
        frame: The frame of a constructor; arguments of subclass constructors that called it are included.
    """
    given = {
        name: dataclasses.asdict(value)
        for name, value in _arguments(frame).items()
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and not _is_configured(name)
    }
    return {name: value for name, value in given.items() if _is_plain(value)}


def _is_configured(name: str) -> bool:
    """Return whether a LightningCLI is building the module, with a configuration of this argument."""
    configured = _given_hyperparameters.get() or {}
    return name in configured and _is_plain(configured[name])


def _levels(frame: FrameType | None) -> list[dict[str, Any]]:
    """Return the arguments of a constructor and then those of each subclass constructor that called it."""
    return [] if frame is None else collect_init_args(frame, [], classes=(L.LightningModule,))


def _arguments(frame: FrameType | None) -> dict[str, Any]:
    """Return the arguments of all constructors; those of subclasses take precedence."""
    return {name: value for arguments in _levels(frame) for name, value in arguments.items()}


def _is_plain(value: object) -> bool:
    """Return whether a value is a number, a str, None, or a container of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)
