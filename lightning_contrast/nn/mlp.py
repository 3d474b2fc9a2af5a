"""The MLP of every head: lightly's generic ``ProjectionHead`` with our layer lists."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias, cast

from torch import nn

from lightning_contrast._checks import check_at_least, check_choice

Norm: TypeAlias = Literal["batch", "layer"] | None
LastNorm: TypeAlias = Literal["full", "scale", "plain"] | None
Activation: TypeAlias = Literal["relu", "gelu"]


class _ScaleBatchNorm1d(nn.BatchNorm1d):
    """Batch normalization with a scale and without an offset."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        nn.init.ones_(self.weight)


def _norm_layer(norm: Norm, dim: int, kind: LastNorm) -> nn.Module | None:
    """Return the normalization of ``dim`` features: with scale and offset, with scale only, or with neither."""
    if norm is None or kind is None:
        return None
    if norm == "layer":
        return nn.LayerNorm(dim, elementwise_affine=kind != "plain", bias=kind == "full")
    if kind == "scale":
        return _ScaleBatchNorm1d(dim)
    return nn.BatchNorm1d(dim, affine=kind == "full")


def mlp_head(
    dims: Sequence[int],
    *,
    norm: Norm = "batch",
    last_norm: LastNorm = None,
    hidden_bias: bool = False,
    last_bias: bool = True,
    activation: Activation = "relu",
) -> nn.Module:
    """Return an MLP: linear, normalization and activation per hidden layer, and a linear output layer.

    Args:
        dims: Widths from input to output, at least two: ``(B, dims[0])`` to ``(B, dims[-1])``.
        norm: Kind of normalization; None leaves it out and adds biases instead.
        last_norm: Normalization of the output: ``"full"`` with scale and offset, ``"scale"``, ``"plain"`` with
            neither, or None.
        hidden_bias: Give hidden layers a bias even before a normalization.
        last_bias: Give the output layer a bias.
        activation: ``"relu"`` or ``"gelu"``.

    Returns:
        A module whose ``layers`` are an ``nn.Sequential`` with three modules per hidden layer (two without ``norm``).
    """
    from lightly.models.modules.heads import ProjectionHead

    check_choice("norm", norm, ("batch", "layer", None))
    check_choice("activation", activation, ("relu", "gelu"))
    for dim in dims:
        check_at_least("dims", dim, 1, "Give positive widths")
    hidden = [
        (
            *(a, b, _norm_layer(norm, b, "full")),
            nn.ReLU(inplace=True) if activation == "relu" else nn.GELU(),
            hidden_bias or norm is None,
        )
        for a, b in pairwise(dims[:-1])
    ]
    bias = last_bias or (norm is None and last_norm is not None)
    last = (dims[-2], dims[-1], _norm_layer(norm, dims[-1], last_norm), None, bias)
    return cast("nn.Module", ProjectionHead([*hidden, last]))


def hidden_layers(head: nn.Module, count: int) -> nn.Sequential:
    """Return the first ``count`` hidden layers of a ReLU head, sharing its parameters (SimCLR v2 evaluates after one).

    Args:
        head: A head that `mlp_head` built.
        count: Number of hidden layers, >= 0.

    Raises:
        ValueError: If the head has fewer hidden layers.
    """
    layers = cast("nn.Sequential", head.layers)
    ends = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    check_choice("count", count, range(len(ends) + 1))
    return layers[: ends[count - 1] if count else 0]
