"""EMA update of momentum modules under every strategy: plain, half precision, FSDP1, FSDP2."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_contrast import distributed
from lightning_contrast.nn.ema import BufferRule, check_same_structure, lerp_tensors, update_buffers
from lightning_contrast.sharding import clean_name

Pairs = Sequence[tuple[nn.Module, nn.Module]]


def check_pairs(pairs: Pairs, root: nn.Module) -> None:
    """Raise a ValueError unless the modules of each pair are alike and no momentum tensor has two sources.

    Args:
        pairs: The online and the momentum modules.
        root: The outermost module of the strategy.
    """
    shapes = not _is_fsdp1(root)  # whose processes hold different parts
    seen: set[int] = set()
    for online, target in pairs:
        check_same_structure(online, target, shapes=shapes)
        own = {id(parameter) for parameter in target.parameters()}
        if own & (seen | {id(parameter) for parameter in online.parameters()}):
            raise ValueError(
                "`momentum_pairs` must give each momentum parameter one source, got a parameter that is in two "
                "momentum modules or is its own source. Copy the online module with `copy.deepcopy`."
            )
        seen |= own


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters and buffers of a module into another of the same structure, which is sharded alike.

    Under FSDP1 it is called where the weights are whole: see `runtime.fsdp.full_weights`.

    Args:
        source: The module to copy.
        target: The copy, changed in place.
    """
    for ours, theirs in zip(*_alike(_parameters(source), _parameters(target)), strict=True):
        theirs.copy_(ours)
    update_buffers(list(source.buffers()), list(target.buffers()), 0.0, "copy")


class Averager:
    """Update EMA modules, with a float32 master for those in half precision.

    Args:
        buffers: Rule for floating buffers: "none", "copy" or "ema"; see `ema_update`.
    """

    def __init__(self, buffers: BufferRule) -> None:
        self.buffers: BufferRule = buffers
        self._masters: dict[str, Tensor] = {}
        self._gathers = False

    def start(self, pairs: Pairs, root: nn.Module) -> None:
        """Prepare for a fit: the modules have their final devices, dtypes and values.

        Args:
            pairs: The online and the momentum modules.
            root: The outermost module of the strategy, from which FSDP1 gathers.
        """
        self._gathers = self._must_gather(pairs, root)
        kept, self._masters = self._masters, {}
        with torch.no_grad(), self._whole(root):
            for name, _, target in self._averaged(pairs):
                if target.dtype in (torch.float16, torch.bfloat16):
                    self._masters[name] = _resume_master(kept.get(name), target)

    @torch.no_grad()
    def update(self, pairs: Pairs, root: nn.Module, momentum: float) -> None:
        """Update every momentum module once.

        Args:
            pairs: The online and the momentum modules.
            root: The outermost module of the strategy, from which FSDP1 gathers.
            momentum: Share of the momentum module that is kept; in [0, 1].
        """
        with self._whole(root):
            if self._masters:
                self._update_masters(pairs, momentum)
            else:
                for online, target in pairs:
                    sources, targets = _alike(_parameters(online), _parameters(target))
                    lerp_tensors(sources, targets, momentum)
            for online, target in pairs:
                rule: BufferRule = "none" if self._masters and self.buffers == "ema" else self.buffers
                update_buffers(list(online.buffers()), list(target.buffers()), momentum, rule)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masters, each with its full shape and on the CPU; every rank must call it."""
        return {name: _whole_tensor(master).cpu() for name, master in self._masters.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load masters of full shape, which `start` distributes."""
        self._masters = dict(state)

    def _update_masters(self, pairs: Pairs, momentum: float) -> None:
        named = self._averaged(pairs)
        sources, targets = _alike([source for _, source, _ in named], [target for _, _, target in named])
        masters = [
            _local(self._masters[name]) if name in self._masters else target
            for (name, _, _), target in zip(named, targets, strict=True)
        ]
        lerp_tensors(sources, masters, momentum)
        for target, master in zip(targets, masters, strict=True):
            if target is not master:
                target.copy_(master)

    def _averaged(self, pairs: Pairs) -> list[tuple[str, Tensor, Tensor]]:
        """Return name, online tensor and momentum tensor of all that is averaged."""
        named = []
        for i, (online, target) in enumerate(pairs):
            sources, targets = _parameters(online), _parameters(target)
            names = [name for name, _ in target.named_parameters()]
            if self.buffers == "ema":
                sources, targets = sources + list(online.buffers()), targets + list(target.buffers())
                names += [name for name, _ in target.named_buffers()]
            named += [(f"{i}.{clean_name(n)}", s, t) for n, s, t in zip(names, sources, targets, strict=True)]
        return named

    def _must_gather(self, pairs: Pairs, root: nn.Module) -> bool:
        """Return whether FSDP1 sharded online and momentum weights differently, or a master needs full weights."""
        if not pairs or not _is_fsdp1(root):
            return False
        differs = any(
            source.shape != target.shape or target.dtype in (torch.float16, torch.bfloat16)
            for online, target_module in pairs
            for source, target in zip(online.parameters(), target_module.parameters(), strict=True)
        )
        device = next(pairs[0][0].parameters()).device
        # Every rank must decide alike, since gathering is a collective.
        return bool(distributed.all_reduce_sum(torch.tensor(int(differs), device=device)).item())

    def _whole(self, root: nn.Module) -> AbstractContextManager[Any]:
        if not self._gathers:
            return nullcontext()
        # Slow, but correct for any wrapping; if both modules are wrapped separately, their shards match.
        return cast("AbstractContextManager[Any]", FullyShardedDataParallel.summon_full_params(root, writeback=True))


def _is_fsdp1(root: nn.Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for module in root.modules())


def _parameters(module: nn.Module) -> list[Tensor]:
    """Return the parameters as they are sharded between steps."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            # A forward pass without a backward pass leaves the root group gathered; an update of those copies is lost.
            child.reshard()
    return list(module.parameters())


def _alike(sources: list[Tensor], targets: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the local parts of both on this process."""
    ours, theirs = [], []
    for source, target in zip(sources, targets, strict=True):
        if isinstance(target, DTensor):
            if not isinstance(source, DTensor) or source.placements != target.placements:
                raise ValueError(
                    "`momentum_pairs` must hold modules that are sharded alike, got a momentum module that is sharded "
                    "and an online module that is not. Call `fully_shard` on both in `configure_model`."
                )
            ours.append(_local(source))
        else:
            ours.append(_whole_tensor(source))
        theirs.append(_local(target))
    return ours, theirs


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _resume_master(kept: Tensor | None, target: Tensor) -> Tensor:
    """Return the float32 master of a momentum tensor: the kept one wherever it rounds to what the tensor holds."""
    fresh = target.detach().float()
    if kept is None or kept.shape != target.shape:
        return fresh.clone()
    if isinstance(target, DTensor) and not isinstance(kept, DTensor):
        kept = distribute_tensor(kept.to(target.device), target.device_mesh, target.placements)
    kept = kept.to(target.device)
    master = fresh.clone()
    local, values = _local(master), _local(kept)
    local.copy_(torch.where(values.to(target.dtype) == _local(target), values, local))
    return master
