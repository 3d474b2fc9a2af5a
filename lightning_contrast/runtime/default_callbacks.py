"""Plug-ins that a module brings itself: they serve that module only, and the user's own always win."""

from typing import Any

from lightning.pytorch import Callback

_OWNER = "owner"  # attribute of a default plug-in: the module that brought it


def owned(defaults: list[Callback], pl_module: Any) -> list[Callback]:
    """Return the default plug-ins of a module, marked as its own.

    Args:
        defaults: New instances.
        pl_module: The module that brings them.
    """
    for callback in defaults:
        setattr(callback, _OWNER, pl_module)
    return defaults


def missing(defaults: list[Callback], present: list[Callback], pl_module: Any) -> list[Callback]:
    """Return those default plug-ins of which a Trainer has none, subclasses counted.

    Args:
        defaults: What `owned` gave for the module.
        present: The Trainer's callbacks; the defaults of another module do not count.
        pl_module: The module that the Trainer runs now.
    """
    valid = [other for other in present if not _is_foreign(other, pl_module)]
    return [c for c in defaults if not any(isinstance(other, type(c)) for other in valid)]


def drop_if_foreign(callback: Callback, trainer: Any, pl_module: Any) -> bool:
    """Take the default plug-in of an earlier module out of a Trainer that runs another one.

    A Trainer keeps what a module's ``configure_callbacks`` gave it when it goes on to the next module.

    Args:
        callback: The callback whose ``setup`` this is.
        trainer: The Trainer, which gets a new list: it iterates over the old one at this moment.
        pl_module: The module that the Trainer runs now.

    Returns:
        Whether the callback was taken out.
    """
    foreign = _is_foreign(callback, pl_module)
    if foreign:
        trainer.callbacks = [other for other in trainer.callbacks if other is not callback]
    return foreign


def _is_foreign(callback: Callback, pl_module: Any) -> bool:
    """Tell whether another module brought the callback; the user's own belong to every module."""
    return getattr(callback, _OWNER, pl_module) is not pl_module
