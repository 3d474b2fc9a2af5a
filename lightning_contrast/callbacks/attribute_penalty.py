"""Features that say less about a protected attribute, for every method."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_contrast._checks import check_choice, check_not_negative, check_positive, check_word, fail, require
from lightning_contrast.callbacks.capture.features import count_images, named_layers
from lightning_contrast.callbacks.capture.labels import check_place, read_labels
from lightning_contrast.losses import hsic_loss


class AttributePenalty(L.Callback):
    """Add a penalty on the dependence of features on a protected attribute to the loss of any module.

    ``weight * losses.hsic_loss(features, attribute)`` is added to the loss before its backward pass, with the features
    of all views of the global batch; the loss that the module logs stays its own. Works with mixed precision,
    accumulation (a penalty per micro-batch), DDP, FSDP, `GradientCache` and manual optimization. There is no further
    forward pass. Logs ``<name>/hsic``, without the weight.

    Independence also removes what the attribute has in common with the task. Watch a probe of the attribute
    (`OnlineLinearProbe` with ``labels=``) and one of the task: a penalty that lowers neither does nothing.

    Args:
        labels: Where the attribute is, ``(B,)`` integers, below 0 for unknown: a key of dict batches, an index into
            tuple batches, or a function of the batch.
        weight: Weight of the penalty, >= 0; `losses.hsic_loss` is at most 0.5 for two groups of the same size, and
            mostly below 0.05.
        features: Name of the submodule whose output is penalized: ``(n B, F)``, tokens ``(n B, N, F)`` or maps
            ``(n B, F, H, W)``, which are averaged, of n views.
        bandwidth: As of `losses.hsic_loss`, > 0.
        name: Prefix of the log key.

    Raises:
        TypeError: If ``labels`` is no place in a batch, or the attribute not an integer tensor.
        ValueError: If a number is out of range, no submodule has that name, it is not called with gradient in a step,
            or its output does not fit the batch.
    """

    def __init__(
        self,
        labels: str | int | Callable[[Any], Tensor],
        *,
        weight: float = 1.0,
        features: str = "backbone",
        bandwidth: float = 1.0,
        name: str = "attribute",
    ) -> None:
        check_place("labels", labels)
        if labels is None:
            hint = "Give a key, an index, or a function of the batch"
            fail("labels", "say where the protected attribute is", labels, hint, TypeError)
        check_not_negative("weight", weight)
        check_positive("bandwidth", bandwidth)
        check_word("name", name)
        self.labels, self.weight, self.features = labels, weight, features
        self.bandwidth, self.name = bandwidth, name
        self._handle: RemovableHandle | None = None
        self._groups: Tensor | None = None  # of the batch of a step, (B,)
        self._outputs: list[Tensor] = []

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
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hook: `on_train_end` is not called after an exception."""
        self._detach()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the attribute of the batch."""
        groups = read_labels(batch, self.labels, type(self).__name__)
        size = count_images(batch)
        require(len(groups) == size, "labels", f"be {size}, one for each image", len(groups), "Check their place")
        self._groups, self._outputs = groups.to(pl_module.device), []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Add the penalty to the loss."""
        groups, outputs = self._groups, self._outputs
        self._outputs = []
        if groups is None:
            return
        hint = "Name a layer that the training step calls with gradient"
        require(len(outputs) > 0, "features", f"be called in each step ({self.features!r} is not)", 0, hint)
        rows = torch.cat(outputs)
        hsic = hsic_loss(rows, groups.repeat(len(rows) // len(groups)), bandwidth=self.bandwidth)
        pl_module.log(f"{self.name}/hsic", hsic.detach(), batch_size=len(groups))
        if self.weight == 0 or not loss.requires_grad:
            return
        penalty = self.weight * hsic
        if pl_module.automatic_optimization:
            penalty = penalty / trainer.accumulate_grad_batches  # as the loss is
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        penalty = penalty if scaler is None else scaler.scale(penalty)
        loss.add_(penalty.to(loss.dtype))  # in place: the Trainer takes no other loss from a callback

    def _record(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Keep the features of a call with gradient."""
        groups = self._groups
        if groups is None or not torch.is_grad_enabled():
            return
        ok = isinstance(output, Tensor) and output.ndim in (2, 3, 4) and len(groups) and len(output) % len(groups) == 0
        if not ok:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            rule = f"give one row for each of the {len(groups)} images ({self.features!r} does not)"
            fail("features", rule, got, "Name a layer with an output (B, F), (B, N, F) or (B, F, H, W)")
        if output.requires_grad:
            features = output.transpose(1, 2) if output.ndim == 3 else output  # (n B, F, ...)
            self._outputs.append(features if features.ndim == 2 else features.flatten(2).mean(2))

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._groups, self._outputs = None, None, []
