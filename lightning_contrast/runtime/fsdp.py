"""Sharded modules: FSDP2 sharding of submodules, gradient clipping and full weights under FSDP1, optimizer state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import lightning as L
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, Optimizer

from lightning_contrast._checks import require
from lightning_contrast.optim import LARS, clip_gradients_together
from lightning_contrast.sharding import is_fsdp1_shard


class ShardedClippingModule(L.LightningModule):
    """LightningModule with gradient clipping by norm under FSDP1 too, which Lightning does not support."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer is configured; gradients may be sharded by FSDP1."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and any(map(is_fsdp1_shard, parameters)):
            clip_gradients_together(parameters, gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


def shard_submodules(module: nn.Module, mesh: DeviceMesh, methods: Mapping[str, Sequence[str]]) -> None:
    """Shard each child that has parameters over the data-parallel ranks; a second call has no effect.

    Args:
        module: The LightningModule, which is not sharded itself.
        mesh: Lightning's mesh, with the dimensions "data_parallel" and "tensor_parallel".
        methods: Methods other than ``forward`` that a step calls, by the name of their child.

    Raises:
        ValueError: If the mesh uses tensor parallelism.
    """
    tensor_parallel = mesh["tensor_parallel"].size()
    hint = "Use `ModelParallelStrategy(tensor_parallel_size=1)`"
    require(tensor_parallel == 1, "tensor_parallel_size", "be 1", tensor_parallel, hint)
    for name, child in module.named_children():
        if any(True for _ in child.parameters()) and not isinstance(child, FSDPModule):
            for weight in child.parameters():
                weight.data = weight.data.contiguous()  # FSDP2 does not support channels-last weights
            fully_shard(child, mesh=mesh["data_parallel"])
            for method in methods.get(name, ()):
                register_fsdp_forward_method(child, method)


def initialize_optimizer_state(optimizer: Optimizer) -> Optimizer:
    """Create the optimizer state of every sharded parameter, as its first step would, and return the optimizer.

    FSDP cannot load a checkpoint in which a parameter has no state, such as those that a method freezes in its first
    epochs. Optimizers other than SGD, LARS, Adam and AdamW are returned unchanged.

    Args:
        optimizer: An optimizer that has not stepped yet.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight in optimizer.state or not (isinstance(weight, DTensor) or is_fsdp1_shard(weight)):
                continue
            if isinstance(optimizer, SGD | LARS) and group["momentum"] > 0:
                optimizer.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}
            elif isinstance(optimizer, Adam) and not group["amsgrad"]:
                device = weight.device if group["fused"] or group["capturable"] else torch.device("cpu")
                step = torch.zeros((), dtype=torch.float32, device=device)
                averages = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[weight] = {"step": step} | averages
    return optimizer


def strategy_module(module: L.LightningModule) -> nn.Module:
    """Return the module as the strategy has wrapped it: FSDP1's wrapper knows the shapes of flattened parameters.

    Args:
        module: The LightningModule, with or without a Trainer.
    """
    strategy = module.trainer.strategy if module._trainer is not None else None
    return module if strategy is None or strategy.model is None else strategy.model


@contextmanager
def full_weights(module: L.LightningModule, part: nn.Module) -> Iterator[None]:
    """Gather the weights that FSDP1 has sharded, and write changes back. Not to be used within a step.

    Args:
        module: The LightningModule.
        part: The submodule to change; weights are gathered only if it is sharded.
    """
    root = strategy_module(module)
    if isinstance(root, FullyShardedDataParallel) and any(map(is_fsdp1_shard, part.parameters())):
        with FullyShardedDataParallel.summon_full_params(root, writeback=True):
            yield
    else:
        yield


def has_local_batchnorm(module: nn.Module) -> bool:
    """Return whether a module has BatchNorm layers that are not synchronized between ranks."""
    kinds = [type(child) for child in module.modules()]
    local = any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds)
    return local and nn.SyncBatchNorm not in kinds
