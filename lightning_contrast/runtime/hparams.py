"""Constructor arguments of a method that a checkpoint keeps as hyperparameters."""

import dataclasses
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities.parsing import collect_init_args


def caller(frame: FrameType | None) -> FrameType | None:
    """Return the frame that called the given one."""
    return frame.f_back if frame is not None else None


def unsaved_arguments(frame: FrameType | None) -> list[str]:
    """Return the names of the constructor arguments that a checkpoint with ``weights_only=True`` cannot hold.

    Args:
        frame: The frame of a constructor; arguments of subclass constructors that called it are included.
    """
    return [name for name, value in _arguments(frame) if not _is_plain(value)]


def settings_as_dicts(frame: FrameType | None) -> dict[str, dict[str, Any]]:
    """Return the constructor arguments that are dataclasses of plain values, such as `losses.Negatives`, as dicts.

    Constructors that take such a dataclass accept its dict too, so that it can be restored from a checkpoint.

    Args:
        frame: The frame of a constructor; arguments of subclass constructors that called it are included.
    """
    given = {
        name: dataclasses.asdict(value)
        for name, value in _arguments(frame)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
    }
    return {name: value for name, value in given.items() if _is_plain(value)}


def _arguments(frame: FrameType | None) -> list[tuple[str, Any]]:
    """Return names and values of the arguments of a constructor and of the subclass constructors that called it."""
    levels = [] if frame is None else collect_init_args(frame, [], classes=(L.LightningModule,))
    return [argument for arguments in levels for argument in arguments.items()]


def _is_plain(value: object) -> bool:
    """Return whether a value is a number, a str, None, or a container of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)
