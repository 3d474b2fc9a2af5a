"""Gradient clipping under mixed precision."""

from typing import Any

from torch.optim import Optimizer

from lightning_contrast._checks import fail


def check_unscaled(trainer: Any, optimizer: Optimizer, clip_grad: float) -> None:
    """Refuse to clip gradients that a fused optimizer will unscale only in its step.

    Args:
        trainer: The Trainer of the fit.
        optimizer: The optimizer that is about to step.
        clip_grad: The ``clip_grad`` of the method, for the error text.

    Raises:
        ValueError: If the optimizer is fused and gradients are scaled.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        hint = "Build the optimizer with fused=False, set `clip_grad=None`, or use bf16-mixed"
        fail("clip_grad", "be None for a fused optimizer under 16-mixed", clip_grad, hint)
