"""Exact large contrastive batches with the memory of small ones."""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lightning_contrast._checks import check_at_least, check_choice, fail
from lightning_contrast.nn.activation_checkpointing import frozen_running_statistics


class GradientCache(Callback):
    """Run one module in chunks, so that a large batch needs the memory of a small one.

    GradCache (https://arxiv.org/abs/2101.06983) without its surrogate loss: the forward pass of the module stores only
    its outputs, the loss uses the embeddings of the whole batch, and the single backward pass recomputes each chunk.
    The gradient is that of the whole batch (1e-6 relative in float32), dropout masks are reproduced, and mixed
    precision, accumulation, clipping, DDP and FSDP work unchanged. It costs one additional forward pass.

    BatchNorm computes its statistics per chunk, so the result is not the exact large batch: use networks without
    BatchNorm, or `SyncBatchNorm` and large chunks. The running averages are updated once per chunk and not in the
    recomputation. Evaluation and passes without gradient run unchanged.

    Differs from the reference implementation: no surrogate loss and no manual optimization; other networks of the step
    are not chunked.

    Args:
        chunk_size: Images per chunk on each rank, >= 1. Smaller batches run unchanged.
        module: Name of the submodule whose ``forward`` is run in chunks. Its first argument and each tensor of its
            output have the batch as first dimension; it takes no other tensors.

    Raises:
        TypeError: If ``chunk_size`` is not a whole number, or the inputs or outputs of the module do not fit.
        ValueError: If ``chunk_size`` is below 1, or the LightningModule has no submodule of that name.
    """

    def __init__(self, chunk_size: int, module: str = "backbone") -> None:
        check_at_least("chunk_size", chunk_size, 1)
        self.chunk_size, self.module = chunk_size, module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the module's ``forward`` by the chunked one, inside any wrapper of the strategy."""
        modules = dict(pl_module.named_modules())
        check_choice("module", self.module, [name for name in modules if name])
        module = _inside_fsdp(modules[self.module])
        module.__dict__["forward"] = ChunkedForward(module, self.chunk_size)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's ``forward``."""
        self._undo(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module's ``forward``: ``teardown`` is not called after an exception."""
        self._undo(pl_module)

    def _undo(self, pl_module: LightningModule) -> None:
        module = dict(pl_module.named_modules()).get(self.module)
        if module is None:
            return
        module = _inside_fsdp(module)
        chunked = module.__dict__.get("forward")
        if isinstance(chunked, ChunkedForward):
            del module.__dict__["forward"]
            if chunked.inner is not None:
                module.__dict__["forward"] = chunked.inner


class ChunkedForward:
    """Replacement of a module's ``forward`` that runs it in chunks; can be copied and pickled with the module.

    Args:
        module: The module whose forward pass is run in chunks.
        chunk_size: Rows per chunk, >= 1.

    Attributes:
        inner: A previous ``forward`` of the instance; None if it is that of the class.
    """

    def __init__(self, module: nn.Module, chunk_size: int) -> None:
        self.module, self.chunk_size = module, chunk_size
        self.inner = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module's forward pass.

        Raises:
            TypeError: If the module gets no tensor first or another one, or its outputs have not one row per image.
        """
        forward = self.inner or type(self.module).forward.__get__(self.module)
        batch = args[0] if args else None
        if not torch.is_grad_enabled() or (isinstance(batch, Tensor) and len(batch) <= self.chunk_size):
            return forward(*args, **kwargs)
        others, _ = tree_flatten((args[1:], kwargs))
        if not isinstance(batch, Tensor) or any(isinstance(other, Tensor) for other in others):
            got = ", ".join(type(value).__name__ for value in (*args, *kwargs.values()))
            hint = "Name a submodule with one tensor as input, such as the backbone"
            fail("module", "take one tensor, as its first argument, to run in chunks", got, hint, TypeError)

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), frozen_running_statistics(self.module)

        chunks = torch.split(batch, self.chunk_size)
        outputs = [
            checkpoint(forward, chunk, *args[1:], use_reentrant=False, context_fn=contexts, **kwargs)
            for chunk in chunks
        ]
        return _concatenate(outputs, [len(chunk) for chunk in chunks])


def _concatenate(outputs: list[Any], sizes: list[int]) -> Any:
    """Concatenate the outputs of the chunks: tensors, or nested tuples, lists and dicts of tensors."""
    flat = [tree_flatten(output)[0] for output in outputs]
    for leaf in flat[0]:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != sizes[0]:
            got = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            hint = "Name a submodule whose outputs have one row per image"
            fail("module", f"return tensors of {sizes[0]} rows for {sizes[0]} images", got, hint, TypeError)
    columns = [torch.cat(column) for column in zip(*flat, strict=True)]
    return tree_unflatten(columns, tree_flatten(outputs[0])[1])


def _inside_fsdp(module: nn.Module) -> nn.Module:
    """Return the module inside an FSDP1 wrapper, or the module itself."""
    return module.module if isinstance(module, FullyShardedDataParallel) else module
