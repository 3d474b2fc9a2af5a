"""Head modules of the self-distillation family (DINO, iBOT): an MLP, L2 normalization, and prototypes."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast.nn.weight_norm import WeightNormLinear


class DistillationHead(nn.Module):
    """An MLP to a bottleneck, L2 normalization, and weight-normalized prototypes: DINO's head.

    Attributes:
        mlp: Features (N, F) to bottleneck (N, D).
        last_layer: Unit-length bottleneck to logits (N, K).
    """

    def __init__(self, mlp: nn.Module, last_layer: WeightNormLinear) -> None:
        super().__init__()
        self.mlp, self.last_layer = mlp, last_layer

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits ``(..., K)`` of features ``(..., F)``."""
        return cast("Tensor", self.last_layer(_bottleneck(self.mlp, features)))


class PatchDistillationHead(nn.Module):
    """A `DistillationHead` for class tokens and patches that share the MLP: iBOT's head.

    Attributes:
        mlp: Tokens (N, F) to bottleneck (N, D), for class tokens and patches.
        last_layer: Unit-length bottleneck to logits (N, K).
        patch_last_layer: The same for patches, (N, K'); None where they share ``last_layer``.
    """

    def __init__(
        self, mlp: nn.Module, last_layer: WeightNormLinear, patch_last_layer: WeightNormLinear | None = None
    ) -> None:
        super().__init__()
        self.mlp, self.last_layer, self.patch_last_layer = mlp, last_layer, patch_last_layer

    def forward(self, tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of class tokens and of patches, with one forward pass of the MLP.

        Args:
            tokens: Class tokens, ``(..., F)``.
            patches: Patches, ``(..., F)``; there may be none, ``(0, F)``.

        Returns:
            ``(..., K)`` and ``(..., K')`` with the leading dimensions of the inputs.
        """
        rows = [tokens.flatten(0, -2), patches.flatten(0, -2)]
        joined = _bottleneck(self.mlp, torch.cat(rows))
        token_rows, patch_rows = joined[: len(rows[0])], joined[len(rows[0]) :]
        patch_layer = self.last_layer if self.patch_last_layer is None else self.patch_last_layer
        token_logits, patch_logits = self.last_layer(token_rows), patch_layer(patch_rows)
        return token_logits.unflatten(0, tokens.shape[:-1]), patch_logits.unflatten(0, patches.shape[:-1])


def _bottleneck(mlp: nn.Module, features: Tensor) -> Tensor:
    """Return the MLP's output ``(..., D)`` with length 1; BatchNorm sees all rows as one batch."""
    out = mlp(features.flatten(0, -2))
    eps = 1e-6 if out.dtype == torch.float16 else 1e-12  # 1e-12 is 0 in float16
    return F.normalize(out, dim=-1, eps=eps).view(*features.shape[:-1], out.shape[-1])
