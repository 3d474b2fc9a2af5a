"""Exact large contrastive batches in the memory of small ones."""

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
    """Runs one module chunk by chunk, so that a large batch takes the memory of a small one.

    GradCache (https://arxiv.org/abs/2101.06983) without its second loss: the forward pass of the module keeps nothing
    but its outputs, the loss sees the embeddings of the whole batch, and the one ordinary backward pass computes each
    chunk again. The gradient is that of the whole batch (1e-6 relative in float32), dropout masks are repeated, and
    mixed precision, accumulation, clipping, DDP and FSDP need nothing more. It costs one more forward pass.

    With BatchNorm the statistics are those of each chunk, so it is not the exact large batch: use it for networks
    without BatchNorm, or with `SyncBatchNorm` and chunks that are large enough. The running averages move once a chunk
    and not again in the second computation. Evaluation and passes without gradient run unchanged.

    Differs from it: no surrogate loss and no manual optimization; other networks of the step are not chunked.

    Args:
        chunk_size: Images a chunk, >= 1, on each rank. A batch that is not larger runs as it is.
        module: Name of the submodule whose ``forward`` is run in chunks. Its first argument and each tensor of its
            output have the batch as first dimension; it takes no other tensors.

    Raises:
        TypeError: If ``chunk_size`` is not a whole number, or the module is given or gives something else.
        ValueError: If it is below 1, or the LightningModule has no submodule of that name.
    """

    def __init__(self, chunk_size: int, module: str = "backbone") -> None:
        check_at_least("chunk_size", chunk_size, 1)
        self.chunk_size, self.module = chunk_size, module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the chunked pass in the place of the module's ``forward``, inside of what strategies wrap around it."""
        modules = dict(pl_module.named_modules())
        check_choice("module", self.module, [name for name in modules if name])
        module = _inside_fsdp(modules[self.module])
        module.__dict__["forward"] = ChunkedForward(module, self.chunk_size)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own ``forward`` back."""
        self._undo(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own ``forward`` back: ``teardown`` is not called after an error."""
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
    """Stands in the place of a module's ``forward``; can be copied and pickled with the module.

    Args:
        module: The module whose forward pass is to be run in chunks.
        chunk_size: Rows a chunk, >= 1.
    """

    def __init__(self, module: nn.Module, chunk_size: int) -> None:
        self.module, self.chunk_size = module, chunk_size
        self.inner = module.__dict__.get("forward")
        """A ``forward`` of the instance, which was there before; None where it is the class's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's forward pass returns."""
        forward = self.inner or type(self.module).forward.__get__(self.module)
        batch = args[0] if args else None
        if not torch.is_grad_enabled() or (isinstance(batch, Tensor) and len(batch) <= self.chunk_size):
            return forward(*args, **kwargs)
        others, _ = tree_flatten((args[1:], kwargs))
        if not isinstance(batch, Tensor) or any(isinstance(other, Tensor) for other in others):
            got = ", ".join(type(value).__name__ for value in (*args, *kwargs.values()))
            hint = "Name a submodule that gets one tensor, such as the backbone"
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
    """Join the outputs of the chunks: tensors, or any nesting of them in tuples, lists and dicts."""
    flat = [tree_flatten(output)[0] for output in outputs]
    for leaf in flat[0]:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != sizes[0]:
            got = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            hint = "Name a submodule whose outputs have one row for each image"
            fail("module", f"return tensors of {sizes[0]} rows for {sizes[0]} images", got, hint, TypeError)
    columns = [torch.cat(column) for column in zip(*flat, strict=True)]
    return tree_unflatten(columns, tree_flatten(outputs[0])[1])


def _inside_fsdp(module: nn.Module) -> nn.Module:
    """Return the module that an FSDP1 wrapper holds, or the module itself."""
    return module.module if isinstance(module, FullyShardedDataParallel) else module
