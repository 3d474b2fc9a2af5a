"""What a method needs to run on several ranks: FSDP2's shards, and a look at its BatchNorm."""

from collections.abc import Mapping, Sequence

import lightning as L
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_contrast._checks import require


def shard_submodules(module: nn.Module, mesh: DeviceMesh, methods: Mapping[str, Sequence[str]]) -> None:
    """Shard each child with parameters over the data-parallel ranks; a second call changes nothing.

    Args:
        module: The LightningModule; it is not sharded itself.
        mesh: Lightning's mesh, with the dimensions "data_parallel" and "tensor_parallel".
        methods: Methods other than ``forward`` that a step calls, by the name of the child that has them.

    Raises:
        ValueError: If the mesh asks for tensor parallelism.
    """
    tensor_parallel = mesh["tensor_parallel"].size()
    mend = "Use `ModelParallelStrategy(tensor_parallel_size=1)`"
    require(tensor_parallel == 1, "tensor_parallel_size", "be 1", tensor_parallel, mend)
    for name, child in module.named_children():
        if any(True for _ in child.parameters()) and not isinstance(child, FSDPModule):
            for weight in child.parameters():
                weight.data = weight.data.contiguous()  # FSDP2 refuses channels-last weights
            fully_shard(child, mesh=mesh["data_parallel"])
            for method in methods.get(name, ()):
                register_fsdp_forward_method(child, method)


def outermost(module: L.LightningModule) -> nn.Module:
    """Return what the strategy has wrapped around a module: FSDP1 keeps there what shapes it has flattened.

    Args:
        module: The LightningModule, of a fit or without a Trainer.
    """
    strategy = module.trainer.strategy if module._trainer is not None else None
    return module if strategy is None or strategy.model is None else strategy.model


def has_local_batchnorm(module: nn.Module) -> bool:
    """Tell whether a module has BatchNorm whose statistics each rank would keep for itself."""
    kinds = [type(child) for child in module.modules()]
    local = any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds)
    return local and nn.SyncBatchNorm not in kinds
