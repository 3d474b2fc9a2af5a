"""Exact large contrastive batches with the memory of small ones."""

from collections.abc import Sequence
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
    """Run networks in chunks, so that a large batch needs the memory of a small one.

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
        module: Name of the submodule whose ``forward`` is run in chunks, or several names. None: the backbone, or what
            the LightningModule names in ``cached_modules``: both towers of CLIP. With it run the other methods that a
            step calls according to the ``sharded_methods`` of the LightningModule, such as ``tokens`` of a `MaskedViT`
            (iBOT, DINOv2, MSN, I-JEPA). The first argument and each tensor of the output have the batch as first
            dimension; ``forward`` takes no other tensors, the other methods only such with one row per image, such as
            masks (B, N).

    Raises:
        TypeError: If ``chunk_size`` is not a whole number, or the inputs or outputs of the module do not fit.
        ValueError: If ``chunk_size`` is below 1, or the LightningModule has no submodule of that name.
    """

    def __init__(self, chunk_size: int, module: str | Sequence[str] | None = None) -> None:
        check_at_least("chunk_size", chunk_size, 1)
        self.chunk_size, self.module = chunk_size, module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the module's ``forward`` and its like by chunked ones, inside any wrapper of the strategy."""
        modules = dict(pl_module.named_modules())
        names = self._names(pl_module)
        for name in names:
            check_choice("module", name, [name for name in modules if name])
        for name in names:
            module = _inside_fsdp(modules[name])
            for method in self._methods(pl_module, name):
                module.__dict__[method] = ChunkedForward(module, self.chunk_size, method)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's ``forward``."""
        self._undo(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module's ``forward``: ``teardown`` is not called after an exception."""
        self._undo(pl_module)

    def _names(self, pl_module: LightningModule) -> tuple[str, ...]:
        """Return the names of the submodules that are run in chunks."""
        if self.module is None:
            return tuple(getattr(pl_module, "cached_modules", ("backbone",)))
        return (self.module,) if isinstance(self.module, str) else tuple(self.module)

    def _methods(self, pl_module: LightningModule, name: str) -> tuple[str, ...]:
        """Return the names of the methods of a submodule that a step calls."""
        return ("forward", *getattr(pl_module, "sharded_methods", {}).get(name, ()))

    def _undo(self, pl_module: LightningModule) -> None:
        modules = dict(pl_module.named_modules())
        for name in self._names(pl_module):
            if name not in modules:
                continue
            module = _inside_fsdp(modules[name])
            for method in self._methods(pl_module, name):
                chunked = module.__dict__.get(method)
                if isinstance(chunked, ChunkedForward):
                    del module.__dict__[method]
                    if chunked.inner is not None:
                        module.__dict__[method] = chunked.inner


class ChunkedForward:
    """Replacement of a module's method that runs it in chunks; can be copied and pickled with the module.

    Args:
        module: The module whose forward pass is run in chunks.
        chunk_size: Rows per chunk, >= 1.
        method: Name of the method.

    Attributes:
        inner: A previous method of the instance; None if it is that of the class.
    """

    def __init__(self, module: nn.Module, chunk_size: int, method: str = "forward") -> None:
        self.module, self.chunk_size, self.method = module, chunk_size, method
        self.inner = module.__dict__.get(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module's method.

        Raises:
            TypeError: If the module gets no tensor first, or another one or an output without one row per image.
        """
        forward = self.inner or getattr(type(self.module), self.method).__get__(self.module)
        batch = args[0] if args else None
        if not torch.is_grad_enabled() or (isinstance(batch, Tensor) and len(batch) <= self.chunk_size):
            return forward(*args, **kwargs)
        others, structure = tree_flatten((args[1:], kwargs))
        tensors = [other for other in others if isinstance(other, Tensor)]
        rows_only = isinstance(batch, Tensor) and all(other.ndim > 1 and len(other) == len(batch) for other in tensors)
        if not isinstance(batch, Tensor) or not rows_only or (tensors and self.method == "forward"):
            got = ", ".join(type(value).__name__ for value in (*args, *kwargs.values()))
            hint = "Name a submodule with one tensor as input, such as the backbone"
            fail("module", "take one tensor, as its first argument, to run in chunks", got, hint, TypeError)

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), frozen_running_statistics(self.module)

        outputs, sizes = [], []
        for start in range(0, len(batch), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            parts = [other[rows] if isinstance(other, Tensor) else other for other in others]
            more, named = tree_unflatten(parts, structure)
            outputs.append(checkpoint(forward, batch[rows], *more, use_reentrant=False, context_fn=contexts, **named))
            sizes.append(len(batch[rows]))
        return _concatenate(outputs, sizes)


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
