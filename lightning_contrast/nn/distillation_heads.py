"""Heads of the self-distillation family, each with the layers of its authors' program: DINO, iBOT, MSN.

All hidden layers are a linear one with bias, a normalisation where ``norm`` asks for it, and GELU. Linear weights start
as a normal with deviation 0.02, biases at 0.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice
from lightning_contrast.nn.mlp import Norm
from lightning_contrast.nn.weight_norm import WeightNormLinear
from lightning_contrast.precision import float32_products

_PROTOTYPES_HINT = "A distribution needs at least two; DINO has 65536, iBOT 8192"


class DistillationHead(nn.Module):
    """An MLP, L2-normalisation, and a layer of weight-normalised prototypes; see `dino_head`.

    Attributes:
        mlp: Features (N, F) to bottleneck (N, D).
        last_layer: Bottleneck of length 1 to logits (N, K).
    """

    def __init__(self, mlp: nn.Module, last_layer: WeightNormLinear) -> None:
        super().__init__()
        self.mlp, self.last_layer = mlp, last_layer

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits ``(..., K)`` of features ``(..., F)``."""
        return cast("Tensor", self.last_layer(_bottleneck(self.mlp, features)))


class PatchDistillationHead(nn.Module):
    """A head for class tokens and patches that share its MLP; see `ibot_head`.

    Attributes:
        mlp: Tokens (N, F) to bottleneck (N, D), for class tokens and patches.
        last_layer: Bottleneck of length 1 to logits (N, K).
        patch_last_layer: The same for patches, (N, K'); None where they share ``last_layer``.
    """

    def __init__(
        self, mlp: nn.Module, last_layer: WeightNormLinear, patch_last_layer: WeightNormLinear | None = None
    ) -> None:
        super().__init__()
        self.mlp, self.last_layer, self.patch_last_layer = mlp, last_layer, patch_last_layer

    def forward(self, tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of class tokens and of patches, from one pass of the MLP.

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


def dino_head(
    in_dim: int,
    hidden_dim: int = 2048,
    bottleneck_dim: int = 256,
    prototypes: int = 65536,
    *,
    layers: int = 3,
    norm: Norm = None,
    norm_last_layer: bool = True,
) -> DistillationHead:
    """Return DINO's head: an MLP to a bottleneck, L2-normalisation, weight-normalised prototypes.

    Source: https://github.com/facebookresearch/dino (``DINOHead``). DINOv2's heads are the same with
    ``norm_last_layer=False``.

    Args:
        in_dim: Width F of the features.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width D of the bottleneck.
        prototypes: Number K of logits, >= 2.
        layers: Number of linear layers of the MLP, >= 1.
        norm: Normalisation of the hidden layers: "batch", "layer" or None, the paper's.
        norm_last_layer: Freeze the prototypes' lengths at 1, which is safer; False trains them.

    Raises:
        ValueError: If a number is out of its range.
    """
    mlp = _gelu_mlp(in_dim, hidden_dim, bottleneck_dim, layers, norm)
    return DistillationHead(mlp, _last_layer(bottleneck_dim, prototypes, norm_last_layer))


def ibot_head(
    in_dim: int,
    hidden_dim: int = 2048,
    bottleneck_dim: int = 256,
    prototypes: int = 8192,
    patch_prototypes: int | None = None,
    *,
    shared: bool = True,
    layers: int = 3,
    norm: Norm = None,
    norm_last_layer: bool = True,
) -> PatchDistillationHead:
    """Return iBOT's head: DINO's, with the MLP and, if ``shared``, the prototypes for class tokens and patches.

    Source: https://github.com/bytedance/ibot (``iBOTHead``). The published runs of ViTs share; the program's default
    for the student does not.

    Args:
        in_dim: Width F of the tokens.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width D of the bottleneck.
        prototypes: Number K of logits of class tokens, >= 2.
        patch_prototypes: Number K' of logits of patches, >= 2; None is ``prototypes``, the only choice if ``shared``.
        shared: Use the same prototypes for class tokens and patches.
        layers: As in `dino_head`.
        norm: As in `dino_head`.
        norm_last_layer: As in `dino_head`.

    Raises:
        ValueError: If a number is out of its range.
    """
    mlp = _gelu_mlp(in_dim, hidden_dim, bottleneck_dim, layers, norm)
    last_layer = _last_layer(bottleneck_dim, prototypes, norm_last_layer)
    count = prototypes if patch_prototypes is None else patch_prototypes
    if not shared:
        return PatchDistillationHead(
            mlp, last_layer, _last_layer(bottleneck_dim, count, norm_last_layer, "patch_prototypes")
        )
    check_choice("patch_prototypes", patch_prototypes, (None, prototypes))
    return PatchDistillationHead(mlp, last_layer)


def msn_head(in_dim: int, hidden_dim: int = 2048, out_dim: int = 256, *, norm: Norm = "batch") -> nn.Module:
    """Return MSN's projector: three linear layers with biases, the output as it is.

    Source: https://github.com/facebookresearch/msn (``init_model``).

    Args:
        in_dim: Width F of the features.
        hidden_dim: Width of the hidden layers.
        out_dim: Width of the projection.
        norm: Normalisation of the hidden layers: "batch", the paper's, "layer" or None.
    """
    return _gelu_mlp(in_dim, hidden_dim, out_dim, 3, norm)


def _bottleneck(mlp: nn.Module, features: Tensor) -> Tensor:
    """Return the L2-normalized output of the MLP, ``(..., D)``, in float32; BatchNorm sees all rows as one batch."""
    out = mlp(features.flatten(0, -2))
    with float32_products(out.device.type):
        unit = F.normalize(out.to(torch.promote_types(out.dtype, torch.float32)), dim=-1)
    return unit.view(*features.shape[:-1], out.shape[-1])


def _last_layer(dim: int, prototypes: int, norm_last_layer: bool, name: str = "prototypes") -> WeightNormLinear:
    check_at_least(name, prototypes, 2, _PROTOTYPES_HINT)
    return WeightNormLinear(dim, prototypes, train_scale=not norm_last_layer)


def _gelu_mlp(in_dim: int, hidden_dim: int, out_dim: int, layers: int, norm: Norm) -> nn.Module:
    """Return ``layers`` linear layers with biases, a normalisation and GELU after each but the last."""
    from lightly.models.modules.heads import ProjectionHead

    check_at_least("layers", layers, 1)
    check_choice("norm", norm, ("batch", "layer", None))
    widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
    for width in widths:
        check_at_least("dims", width, 1, "Give positive widths")
    kinds = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    blocks = [
        (widths[i], widths[i + 1], None if norm is None else kinds[norm](widths[i + 1]), nn.GELU(), True)
        for i in range(layers - 1)
    ]
    mlp = ProjectionHead([*blocks, (widths[-2], widths[-1], None, None, True)])
    for module in mlp.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return cast("nn.Module", mlp)
