"""LARS: momentum SGD with a trust ratio per tensor, the ratio of its norm to that of its gradient."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_contrast._checks import check_choice, check_interval, check_not_negative, check_positive, fail
from lightning_contrast.sharding import is_fsdp1_shard, local, local_gradient, trust_ratios


class LARS(Optimizer):
    r"""Layer-wise adaptive rate scaling for large batches (https://arxiv.org/abs/1708.03888).

    With weight ``w``, gradient ``g``, decay ``d`` and rate ``lr``, form A (MoCo v3, Barlow Twins, VICReg, BYOL,
    SimCLR) and form B (apex's LARC in SwAV, timm, lightly) take

    - A: ``u = g + d w``, ``ratio = trust |w| / |u|``
    - B: ``u = g + d w``, ``ratio = trust |w| / (|g| + d |w| + eps)``; with ``clip``, ``min(ratio / lr, 1)``

    and ``ratio = 1`` where a norm is 0; then ``v = momentum v + ratio u`` and ``w = w - lr v``. There are no host
    reads, and ``p.grad`` is not modified. Under FSDP, norms are those of the full tensors, with one all-reduce per
    group.

    Based on https://github.com/facebookresearch/moco-v3 (A) and https://github.com/NVIDIA/apex (B). Differs from them:
    the groups, not the number of dimensions, select the parameters without decay and ratio.

    Args:
        params: Parameters or groups. A group with ``adapt=False`` is plain momentum SGD, without weight decay unless
            the group itself names one; `parameter_groups` makes such groups.
        lr: Learning rate, >= 0.
        momentum: Share of the previous update that is kept, in [0, 1).
        weight_decay: L2 penalty, >= 0.
        trust_coefficient: Factor of the ratio, > 0.
        trust_form: ``"A"`` or ``"B"``.
        eps: Added to the denominator of form B, >= 0.
        clip: Limit the rate of form B to ``lr``.
        lr_in_momentum: Apply the rate before the momentum, ``v = momentum v + lr ratio u`` and ``w = w - v``, as the
            reference implementation of SimCLR does: a change of the rate does not rescale previous updates.

    Raises:
        ValueError: If an argument is out of range, or a gradient is sparse (in `step`).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 0.001,
        trust_form: str = "A",
        eps: float = 1e-8,
        clip: bool = False,
        lr_in_momentum: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "trust_form": trust_form,
            "eps": eps,
            "clip": clip,
            "lr_in_momentum": lr_in_momentum,
            "adapt": True,
        }
        _check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group after checking its options.

        Args:
            param_group: Parameters under ``"params"`` and any of the constructor's arguments.
        """
        if not param_group.get("adapt", True):
            param_group = {"weight_decay": 0.0, **param_group}
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        weights: list[Tensor] = [w for w in group["params"] if w.grad is not None or is_fsdp1_shard(w)]
        updates = _decayed_gradients(weights, group["weight_decay"])
        factors = self._factors(weights, updates, group) if group["adapt"] else None
        lr = group["lr"]
        for_step = [i for i, weight in enumerate(weights) if weight.grad is not None]
        if not for_step:
            return
        shards = [local(weights[i]) for i in for_step]
        buffers = [self._momentum_buffer(weights[i]) for i in for_step]
        chosen = [updates[i] for i in for_step]
        torch._foreach_mul_(buffers, group["momentum"])
        if factors is None:
            torch._foreach_add_(buffers, chosen, alpha=lr if group["lr_in_momentum"] else 1.0)
        else:
            torch._foreach_addcmul_(buffers, chosen, [factors[i] for i in for_step])
        torch._foreach_add_(shards, buffers, alpha=-1.0 if group["lr_in_momentum"] else -lr)

    def _momentum_buffer(self, weight: Tensor) -> Tensor:
        """Return this rank's shard of the momentum; the state is sharded like the parameter."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return local(state["momentum_buffer"])

    def _factors(self, weights: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return the factor of each update: the trust ratio, times the rate with ``lr_in_momentum``."""
        trust, decay, eps, lr = group["trust_coefficient"], group["weight_decay"], group["eps"], group["lr"]
        after = lr if group["lr_in_momentum"] else 1.0

        def form_a(weight: Tensor, update: Tensor) -> Tensor:
            ratio = trust * weight / update
            return torch.where((weight > 0) & (update > 0), ratio, 1.0) * after

        def form_b(weight: Tensor, gradient: Tensor) -> Tensor:
            ratio = trust * weight / (gradient + decay * weight + eps)
            ratio = torch.where((weight > 0) & (gradient > 0), ratio, 1.0)
            return ((ratio / lr).clamp(max=1.0) if group["clip"] else ratio) * after

        if group["trust_form"] == "A":
            return trust_ratios(weights, updates, form_a)
        return trust_ratios(weights, _decayed_gradients(weights, 0.0), form_b)


def _decayed_gradients(weights: list[Tensor], decay: float) -> list[Tensor]:
    """Return this rank's shard of ``grad + decay * weight`` for each weight, empty if it has no gradient.

    Without decay the gradients themselves are returned; callers must not modify them.
    """
    gradients = [local(w).new_empty(0) if w.grad is None else local_gradient(w) for w in weights]
    if decay == 0 or not weights:
        return gradients
    shards = [local(w)[:0] if w.grad is None else local(w) for w in weights]
    return list(torch._foreach_add(gradients, shards, alpha=decay))


def _check(options: dict[str, Any]) -> None:
    """Check the arguments of the optimizer or of one of its groups."""
    for name in ("lr", "weight_decay", "eps"):
        if isinstance(options[name], Tensor):
            fail(name, "be a number", options[name], "A tensor requires a host read", TypeError)
        check_not_negative(name, options[name])
    check_positive("trust_coefficient", options["trust_coefficient"])
    momentum = options["momentum"]
    check_interval("momentum", momentum, "[0, 1)", "Give the share of the previous update to keep")
    check_choice("trust_form", options["trust_form"], ("A", "B"))
    if options["clip"] and options["trust_form"] == "A":
        fail("clip", 'be False with `trust_form="A"`', True, 'Use trust_form="B"')
