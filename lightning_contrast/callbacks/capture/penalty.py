"""Base of callbacks that add a penalty on the features of a step to the loss of any module."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_contrast._checks import check_choice, check_not_negative, check_word, fail, require
from lightning_contrast.callbacks.capture.features import count_images, named_layers


class FeaturePenalty(L.Callback):
    """Add ``weight`` times a penalty on the output of a submodule to the loss, before its backward pass.

    The loss that the module logs stays its own, and there is no further forward pass. Works with mixed precision,
    accumulation (a penalty per micro-batch), DDP, FSDP, `GradientCache` and manual optimization.

    Args:
        weight: Weight of the penalty, >= 0.
        features: Name of a submodule that steps call with gradient; its outputs are ``(n B, F)``, tokens
            ``(n B, N, F)`` or maps ``(n B, F, H, W)``, of n views of B images. Tokens and maps are averaged.
        name: Prefix of the log keys.

    Raises:
        ValueError: If ``weight`` is negative or ``name`` empty.
    """

    def __init__(self, weight: float, features: str, name: str) -> None:
        check_not_negative("weight", weight)
        check_word("name", name)
        self.weight, self.features, self.name = weight, features, name
        self._handle: RemovableHandle | None = None
        self._size: int | None = None  # images of the batch of a step
        self._outputs: list[Tensor] = []

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``."""
        return f"{type(self).__name__}[{self.name}]"

    def penalty(self, pl_module: Any, rows: Tensor, size: int) -> Tensor:
        """Return the penalty of a step without its weight, a scalar, and log it.

        Args:
            pl_module: The LightningModule.
            rows: Features ``(n B, F)`` of all views, one view after the other.
            size: B, the number of images.
        """
        raise NotImplementedError

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the submodule; strategies have wrapped it by now.

        Raises:
            ValueError: If there is none of that name.
        """
        layers = named_layers(pl_module)
        check_choice("features", self.features, layers)
        self._handle = layers[self.features].register_forward_hook(self._record)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the hook."""
        self.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hook: `on_train_end` is not called after an exception."""
        self.detach()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the images of the batch."""
        self._size, self._outputs = count_images(batch), []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Add the penalty to the loss."""
        size, outputs = self._size, self._outputs
        self._outputs = []
        if size is None:
            return
        hint = "Name a layer that the training step calls with gradient"
        require(len(outputs) > 0, "features", f"be called in each step ({self.features!r} is not)", 0, hint)
        value = self.penalty(pl_module, torch.cat(outputs), size)
        if self.weight == 0 or not loss.requires_grad:
            return
        penalty = self.weight * value
        if pl_module.automatic_optimization:
            penalty = penalty / trainer.accumulate_grad_batches  # as the loss is
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        penalty = penalty if scaler is None else scaler.scale(penalty)
        loss.add_(penalty.to(loss.dtype))  # in place: the Trainer takes no other loss from a callback

    def detach(self) -> None:
        """Remove the hook and what was recorded."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._size, self._outputs = None, None, []

    def _record(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Keep the features of a call with gradient."""
        size = self._size
        if size is None or not torch.is_grad_enabled():
            return
        ok = isinstance(output, Tensor) and output.ndim in (2, 3, 4) and size and len(output) % size == 0
        if not ok:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            rule = f"give one row for each of the {size} images ({self.features!r} does not)"
            fail("features", rule, got, "Name a layer with an output (B, F), (B, N, F) or (B, F, H, W)")
        if output.requires_grad:
            features = output.transpose(1, 2) if output.ndim == 3 else output  # (n B, F, ...)
            self._outputs.append(features if features.ndim == 2 else features.flatten(2).mean(2))
