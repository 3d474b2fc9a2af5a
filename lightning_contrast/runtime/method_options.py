"""Keyword arguments that every method shares."""

import inspect
from types import FrameType
from typing import Literal, cast

from lightning_contrast._checks import fail, near_names
from lightning_contrast.nn import BackboneOptions
from lightning_contrast.runtime.hparams import caller


class MethodOptions(BackboneOptions, total=False):
    """Keyword arguments of every method: those of its backbone, and the schedule of its learning rate.

    Attributes:
        lr_schedule: "constant" keeps the learning rate at its peak after the warm-up, also in a run without an end;
            None (default) is the method's schedule.
    """

    lr_schedule: Literal["constant"] | None


def backbone_options(options: MethodOptions) -> BackboneOptions:
    """Return the options that `build_backbone` takes; to be called in the constructor of a method.

    Args:
        options: The keyword arguments that the constructors of the method do not name.

    Raises:
        TypeError: If there is one that no method takes; the message names similar arguments of the method.
    """
    for name, value in options.items():
        if name not in MethodOptions.__annotations__:
            cls, arguments = _method(caller(inspect.currentframe()))
            hint = near_names(name, arguments) or f"It takes {', '.join(arguments)}"
            fail(name, f"be an argument of `{cls}`", value, hint, TypeError)
    return cast("BackboneOptions", {key: value for key, value in options.items() if key != "lr_schedule"})


def _method(frame: FrameType | None) -> tuple[str, list[str]]:
    """Return the name of the method that a constructor with this frame builds, and its arguments in order."""
    module = frame.f_locals.get("self") if frame is not None else None
    arguments: dict[str, None] = {}
    for constructor in (vars(cls)["__init__"] for cls in type(module).__mro__ if "__init__" in vars(cls)):
        for parameter in inspect.signature(constructor).parameters.values():
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                arguments[parameter.name] = None
    own = [name for name in arguments if name not in ("self", *MethodOptions.__annotations__)]
    return type(module).__name__, [*own, *MethodOptions.__annotations__]
