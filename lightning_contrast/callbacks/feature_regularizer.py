"""A regularizer of the features, added to the loss of any method."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch, check_choice, fail
from lightning_contrast.callbacks.capture.penalty import FeaturePenalty
from lightning_contrast.losses import koleo_loss, log_det_loss, uniformity
from lightning_contrast.losses.checks import check_matrix
from lightning_contrast.losses.kernels.covariance import variance_covariance
from lightning_contrast.precision import full_precision


@full_precision
def _covariance(z: Tensor) -> Tensor:
    """Return VICReg's variance term plus 1 / 25 of its covariance term, of one view ``(B, F)``."""
    check_matrix("features", z)
    rows = distributed.gather_with_gradient(z)
    check_batch("features", len(rows))
    variance, covariance = variance_covariance(rows)
    return variance + covariance / 25


REGULARIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "covariance": _covariance,
    "koleo": koleo_loss,
    "log_det": log_det_loss,
    "uniformity": uniformity,
}


class FeatureRegularizer(FeaturePenalty):
    """Add a regularizer that spreads the features to the loss of any module.

    ``weight`` times the mean over the views of the regularizer of a view, over the global batch, is added to the loss
    before its backward pass; the loss that the module logs stays its own. Works with mixed precision, accumulation (a
    penalty per micro-batch), DDP, FSDP, `GradientCache` and manual optimization, and in the step of every method that
    calls the submodule with gradient. There is no further forward pass. Logs ``<name>/<regularizer>``, without the
    weight.

    - "covariance": VICReg's variance and covariance terms, 25 to 1 as published (`losses.vicreg_loss`); the variance
      keeps the covariances from falling with the scale of the features;
    - "log_det": the negative coding rate of the unit features (`losses.log_det_loss`);
    - "koleo": the negative mean log distance to the nearest neighbor (`losses.koleo_loss`), DINOv2's with weight 0.1;
    - "uniformity": the log of the mean Gaussian potential of all pairs (`losses.uniformity`).

    Args:
        regularizer: A name, or a function from the features of a view ``(B, F)`` to a scalar.
        weight: Weight of the regularizer, >= 0.
        features: Name of a submodule that steps call with gradient; its outputs are ``(n B, F)``, tokens
            ``(n B, N, F)`` or maps ``(n B, F, H, W)``, of n views, one after the other. Tokens and maps are averaged.
            "projector" regularizes the projections of the methods that have one.
        name: Prefix of the log key; must differ between regularizers of a Trainer.

    Raises:
        TypeError: If ``regularizer`` is neither a name nor a function.
        ValueError: If the name is unknown or the weight negative; in the fit, if no submodule has the name in
            ``features``, it is not called with gradient in a step, or its output does not fit the batch.

    Example:
        >>> FeatureRegularizer("koleo", weight=0.1, features="projector").kind
        'koleo'
    """

    def __init__(
        self,
        regularizer: str | Callable[[Tensor], Tensor] = "covariance",
        *,
        weight: float = 1.0,
        features: str = "backbone",
        name: str = "regularizer",
    ) -> None:
        super().__init__(weight, features, name)
        if isinstance(regularizer, str):
            check_choice("regularizer", regularizer, REGULARIZERS)
            self.kind, self.regularizer = regularizer, REGULARIZERS[regularizer]
        elif callable(regularizer):
            self.kind, self.regularizer = getattr(regularizer, "__name__", type(regularizer).__name__), regularizer
        else:
            hint = f"Give a function (B, F) -> scalar, or one of {', '.join(map(repr, REGULARIZERS))}"
            fail("regularizer", "be a name or a function", type(regularizer).__name__, hint, TypeError)

    def penalty(self, pl_module: Any, rows: Tensor, size: int) -> Tensor:
        """Return the mean of the regularizer over the views, a scalar.

        Args:
            pl_module: The LightningModule.
            rows: Features ``(n B, F)`` of all views, one view after the other.
            size: B, the number of images.
        """
        value = torch.stack([self.regularizer(view) for view in torch.split(rows, size)]).mean()
        pl_module.log(f"{self.name}/{self.kind}", value.detach(), batch_size=size)
        return value
