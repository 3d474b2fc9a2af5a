"""The strategies that shard or copy a module, in two processes on a CPU."""

import functools
import warnings

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from tests.callbacks.step_modules import QUIET


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 on a CPU: Lightning refuses the name and the class itself, not a subclass."""

    def _setup_model(self, model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FullyShardedDataParallel(
                module=model,
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                device_id=self.root_device,
                **self.kwargs,
            )


def wrap_all(module, recurse, nonwrapped_numel, kinds):
    return True if recurse else isinstance(module, kinds)


def strategy(name):
    """Return a strategy by the name that the tests give it."""
    if name == "ddp":
        return DDPStrategy()
    if name == "fsdp1 root":
        return CPUFSDPStrategy()
    if name == "fsdp1 wrapped":
        return CPUFSDPStrategy(auto_wrap_policy=functools.partial(wrap_all, kinds=(nn.Sequential,)))
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


STRATEGIES = ("ddp", "fsdp1 root", "fsdp1 wrapped", "fsdp2")


def sharded(make):
    """Return a class whose submodules FSDP2 shards, each on its own, and that FSDP1 can optimize."""

    class Sharded(make):
        def configure_model(self):
            if self.device_mesh is None:
                return
            for child in self.children():
                if any(True for _ in child.parameters()) and not isinstance(child, FSDPModule):
                    fully_shard(child, mesh=self.device_mesh["data_parallel"])

        def configure_optimizers(self):
            trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
            return torch.optim.SGD(trained, lr=self.lr, momentum=0.9)

    return Sharded


def fit_ranks(module, callbacks, data, name, *, ckpt_path=None, **kwargs):
    """Fit as one of two ranks and return the trainer."""
    settings = {"max_epochs": 1, "devices": 2} | QUIET | kwargs
    trainer = L.Trainer(strategy=strategy(name), callbacks=callbacks, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


class TakeWeights(L.Callback):
    """Keeps the full weights of a module, sharded or not, and the share of them on this rank."""

    def take(self, trainer, pl_module):
        """Return whole weights by name; every rank must call it."""
        weights, root = {}, trainer.strategy.model
        if isinstance(root, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(root, writeback=False):
                return {clean(n): p.detach().clone() for n, p in pl_module.named_parameters()}
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, parameter in pl_module.named_parameters():
            value = parameter.detach()
            weights[clean(name)] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        return weights

    def on_train_start(self, trainer, pl_module):
        self.history = [self.take(trainer, pl_module)]
        count = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in pl_module.parameters())
        self.local_share = count / sum(w.numel() for w in self.history[0].values())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.history.append(self.take(trainer, pl_module))


def clean(name):
    """Return a parameter's name without FSDP1's wrapper."""
    return name.replace("_fsdp_wrapped_module.", "")
