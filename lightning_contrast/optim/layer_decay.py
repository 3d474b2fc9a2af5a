"""Layer-wise learning rates of a vision transformer, as in DINOv2's reference implementation.

timm's ``param_groups_layer_decay`` does not give these rates: without a classifier it puts the last norm into the layer
of the last block, so all its rates are one power of the decay higher, and it has no multiplier for the patch embedding.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_contrast.sharding import clean_name

_BLOCK = re.compile(r"\bblocks\.(\d+)\.")
_INPUT = re.compile(r"\b(patch_embed|pos_embed|cls_token|reg_token|mask_token)\b")
RATE_MULTIPLIER = "lr_multiplier"  # key of a parameter group


def layer_rates(backbone: nn.Module, layer_decay: float, patch_multiplier: float) -> dict[nn.Parameter, float]:
    """Return the learning-rate factor of each parameter for which it is not 1.

    With ``L`` blocks the factor is ``layer_decay ** (L - i)`` for block ``i``, ``layer_decay ** (L + 1)`` for patch
    embedding, positions and tokens, and 1 for all others.

    Source: https://github.com/facebookresearch/dinov2 (``utils/param_groups.py``).

    Args:
        backbone: A vision transformer with ``blocks``.
        layer_decay: Learning rate of each block as a share of the next block's, > 0.
        patch_multiplier: Additional factor of the patch embedding, > 0.
    """
    named = {clean_name(name): parameter for name, parameter in backbone.named_parameters()}
    depth = 1 + max((int(found[1]) for found in map(_BLOCK.search, named) if found), default=-1)
    rates = {}
    for name, parameter in named.items():
        block = _BLOCK.search(name)
        below = depth - int(block[1]) if block else depth + 1 if _INPUT.search(name) else 0
        rates[parameter] = layer_decay**below * (patch_multiplier if "patch_embed." in name else 1.0)
    return {parameter: rate for parameter, rate in rates.items() if rate != 1}


def split_by_rate(
    groups: Sequence[Mapping[str, Any]], backbone: nn.Module, layer_decay: float, patch_multiplier: float
) -> list[dict[str, Any]]:
    """Split parameter groups so that each has a single learning-rate factor.

    Args:
        groups: Parameter groups; their other settings are kept.
        backbone: See `layer_rates`.
        layer_decay: See `layer_rates`.
        patch_multiplier: See `layer_rates`.
    """
    rates = layer_rates(backbone, layer_decay, patch_multiplier)
    split: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {1.0: []}
        for parameter in group["params"]:
            parts.setdefault(rates.get(parameter, 1.0), []).append(parameter)
        split += [{**group, "params": part, RATE_MULTIPLIER: rate} for rate, part in parts.items()]
    return split


def apply_rates(configured: Mapping[str, Any]) -> None:
    """Multiply the learning rates of a newly built optimizer and its scheduler by the factors of the groups.

    Args:
        configured: Return value of `configure_optimizers`, with a scheduler that has ``base_lrs``.
    """
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr"):
            group[key] *= group.get(RATE_MULTIPLIER, 1.0)
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
