"""Parameter groups with and without weight decay, and of parameters with a learning rate of their own."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_contrast._checks import check_choice, check_not_negative, fail

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(
    module: nn.Module, weight_decay: float, *, exclude: Collection[str] = ("norm", "bias")
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a module into groups with and without weight decay.

    Args:
        module: The module; parameters with ``requires_grad=False`` are skipped, shared ones appear once.
        weight_decay: Decay of the first group, >= 0.
        exclude: Kinds of parameters without weight decay. ``"norm"``: parameters of normalization layers and all other
            vectors and scalars except biases (scales, temperatures). ``"bias"``: parameters whose name ends with
            "bias". Both together are the rule "at most one dimension" of MoCo v3, Barlow Twins and VICReg and the rule
            "norm and bias" of SimCLR and BYOL; SwAV excludes nothing. ``"declared"``: parameters that a submodule names
            in ``no_weight_decay()``, as timm's networks do for positions and class tokens: the rule of OpenCLIP.

    Returns:
        Two groups, possibly empty: the decayed parameters, and the others with ``weight_decay=0`` and ``adapt=False``,
        which excludes them from the trust ratio of `LARS` (other optimizers ignore the key). Then one group for each
        submodule with ``group_options``, such as a `nn.LearnedTemperature`: its own parameters, without weight decay
        and trust ratio, with those options, for example ``lr`` and ``bounds`` (see `build_optimizer`).

    Raises:
        ValueError: If the parameters are flattened into one (FSDP1 without ``use_orig_params=True``).
    """
    check_not_negative("weight_decay", weight_decay)
    for kind in exclude:
        check_choice("exclude", kind, ("norm", "bias", "declared"))
    dims = dict(_unflattened_dims(module))
    declared = set(_declared(module)) if "declared" in exclude else set()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    own: list[dict[str, Any]] = []
    seen: set[nn.Parameter] = set()
    for owner in module.modules():
        options: dict[str, Any] | None = getattr(owner, "group_options", None)
        mine: list[nn.Parameter] = []
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            if hasattr(parameter, "_is_flat_param") or name == "_flat_param":
                fail("use_orig_params", "be True", False, "Pass use_orig_params=True to the FSDP strategy")
            seen.add(parameter)
            if options is not None:
                mine.append(parameter)
                continue
            if parameter in declared:
                kind = "declared"
            elif name.endswith("bias"):
                kind = "bias"
            elif isinstance(owner, _NORMS) or dims.get(parameter, parameter.ndim) <= 1:
                kind = "norm"
            else:
                kind = "weight"
            (others if kind in exclude else decayed).append(parameter)
        if options is not None and mine:
            own.append({"params": mine, "weight_decay": 0.0, "adapt": False, **options})
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0, "adapt": False},
        *own,
    ]


def _declared(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that submodules name in ``no_weight_decay()``."""
    for owner in module.modules():
        names = getattr(owner, "no_weight_decay", None)
        if callable(names):
            parameters = dict(owner.named_parameters())
            yield from (parameters[name] for name in names() if name in parameters)


def _unflattened_dims(module: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield the parameters flattened by FSDP1 with their original number of dimensions."""
    for wrapped in module.modules():
        flat: Any = getattr(getattr(wrapped, "_handle", None), "flat_param", None)
        if getattr(flat, "_params", None) is not None:
            yield from ((p, len(shape)) for p, shape in zip(flat._params, flat._shapes, strict=True))
