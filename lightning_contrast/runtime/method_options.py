"""Keyword arguments that every method shares."""

from typing import Literal, cast

from lightning_contrast.nn import BackboneOptions


class MethodOptions(BackboneOptions, total=False):
    """Keyword arguments of every method: those of its backbone, and the schedule of its learning rate.

    Attributes:
        lr_schedule: "constant" keeps the learning rate at its peak after the warm-up, also in a run without an end;
            None (default) is the method's schedule.
    """

    lr_schedule: Literal["constant"] | None


def backbone_options(options: MethodOptions) -> BackboneOptions:
    """Return the options that `build_backbone` takes."""
    return cast("BackboneOptions", {key: value for key, value in options.items() if key != "lr_schedule"})
