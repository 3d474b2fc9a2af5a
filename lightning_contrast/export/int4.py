"""Weights of linear layers as integers of 4 bits, two per byte, for a file of `load_backbone`."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_choice, require

GROUP_SIZES = (32, 64, 128, 256)
_LOWEST = -8


def round_to_int4(network: nn.Module, group_size: int) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """Return a copy of a network with the weights of its linear layers rounded to 16 levels per group, and the levels.

    The rounded network computes in float, with the weights that `load_backbone` reads from the file: 4 bits are a form
    of storage here. Convolutions, norms, biases and embeddings are left in float, as are linear layers whose input
    width the group size does not divide.

    Source: torchao's ``IntxWeightOnlyConfig(torch.int4, PerGroup(group_size))``, symmetric, chooses the levels. Its
    ``Int4WeightOnlyConfig``, whose kernels compute in 4 bits, needs an accelerator.

    Args:
        network: Maps images ``(B, C, h, w)`` to features ``(B, F)``; it is not modified.
        group_size: Input weights that share a scale: 32, 64, 128 or 256.

    Returns:
        The network, and per weight "packed" (uint8 ``(out, in / 2)``, the first of two weights in the low bits, each
        the level + 8), "scale" (float ``(out, in / group_size)``) and "group_size".

    Raises:
        ValueError: If no linear layer fits, or the group size is unknown.
        ModuleNotFoundError: If torchao is not installed; the message names the extra.
    """
    check_choice("group_size", group_size, GROUP_SIZES)
    try:
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    except ImportError as error:
        hint = "pip install 'lightning_contrast[export]'"
        raise ModuleNotFoundError(f"int4 needs torchao: {hint}.") from error
    found = copy.deepcopy(network)

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % group_size == 0

    four_bits = torch.int4  # type: ignore[attr-defined]  # torch's stubs lack it
    quantize_(found, IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=PerGroup(group_size)), filter_fn=fits)
    levels: dict[str, dict[str, Any]] = {}
    for name, module in found.named_modules():
        if fits(module, name):
            layer = cast("nn.Linear", module)
            weight: Any = layer.weight
            levels[f"{name}.weight"] = {
                "packed": _packed(weight.qdata),
                "scale": weight.scale.float(),
                "group_size": group_size,
            }
            layer.weight = nn.Parameter(weight.dequantize().detach().clone(), requires_grad=False)
    hint = "Choose a smaller `group_size`, or format='onnx-int8' for a convolutional network"
    what = f"have linear layers of an input width that {group_size} divides"
    require(len(levels) > 0, "model", what, type(network).__name__, hint)
    return found, levels


def _packed(levels: Tensor) -> Tensor:
    """Return levels -8..7 ``(out, in)`` as uint8 ``(out, in / 2)``."""
    shifted = (levels.to(torch.int16) - _LOWEST).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)
