"""Default callbacks of a module: added if the Trainer has none of their type, and used with that module only."""

from typing import Any

from lightning.pytorch import Callback

_OWNER = "owner"  # attribute of a default callback: the module whose default it is


def mark_defaults(defaults: list[Callback], pl_module: Any) -> list[Callback]:
    """Mark callbacks as defaults of a module and return them.

    Args:
        defaults: New instances.
        pl_module: The module that returns them from ``configure_callbacks``.
    """
    for callback in defaults:
        setattr(callback, _OWNER, pl_module)
    return defaults


def missing_defaults(defaults: list[Callback], present: list[Callback], pl_module: Any) -> list[Callback]:
    """Return the default callbacks that a Trainer lacks; instances of subclasses count as present.

    Args:
        defaults: Result of `mark_defaults`.
        present: The Trainer's callbacks; defaults of other modules do not count.
        pl_module: The module that the Trainer runs now.
    """
    return [c for c in defaults if not any(isinstance(other, type(c)) for other in of_module(present, pl_module))]


def of_module(callbacks: list[Callback], pl_module: Any) -> list[Callback]:
    """Return the callbacks without the defaults of other modules."""
    return [callback for callback in callbacks if not _belongs_to_other_module(callback, pl_module)]


def is_default_of(callback: Callback, pl_module: Any) -> bool:
    """Return whether a callback is a default of this module, not one of the user."""
    return getattr(callback, _OWNER, None) is pl_module


def remove_if_other_module(callback: Callback, trainer: Any, pl_module: Any) -> bool:
    """Remove a default callback of an earlier module from a Trainer that now runs another one.

    A Trainer keeps the callbacks of ``configure_callbacks`` when it is reused with another module.

    Args:
        callback: The callback whose ``setup`` calls this.
        trainer: The Trainer; it gets a new list, because it is iterating over the old one.
        pl_module: The module that the Trainer runs now.

    Returns:
        Whether the callback was removed.
    """
    other_module = _belongs_to_other_module(callback, pl_module)
    if other_module:
        trainer.callbacks = [other for other in trainer.callbacks if other is not callback]
    return other_module


def _belongs_to_other_module(callback: Callback, pl_module: Any) -> bool:
    """Return whether a callback is a default of another module; the user's callbacks belong to every module."""
    return getattr(callback, _OWNER, pl_module) is not pl_module
