"""Queues of past embeddings, updated after each micro-batch."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_contrast import distributed
from lightning_contrast._checks import fail
from lightning_contrast.nn.feature_queue import FeatureQueue
from lightning_contrast.nn.memory_bank import MemoryBank
from lightning_contrast.runtime.default_callbacks import remove_if_other_module
from lightning_contrast.runtime.optimizer_steps import only_forward, step_was_skipped

_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


class QueueUpdate(Callback):
    """Push the step outputs to the queues of ``queues()`` at the end of each micro-batch.

    The queue of MoCo (https://arxiv.org/abs/1911.05722; reference implementation: moco/builder.py) is updated after the
    loss, so that a key is never its own negative. The keys of all ranks are gathered in rank order, so every rank has
    the same queue; of a `FeatureQueue` with ``sharded=True`` each rank keeps its part. For ``{"keys": queue}`` the step
    output contains ``"keys"`` (B, D); ``"keys_labels"`` (B,) if the queue stores labels; ``"indices"`` (B,) if it is a
    `MemoryBank`. Queues must exist before the fit: create them in ``__init__``. A module with several keys per image
    gives their number as ``keys_per_image``.

    A training step that returned nothing, that `NonFiniteGuard` skipped, or that is only run forward, as at the end of
    Lightning's `StochasticWeightAveraging`, pushes nothing. The keys of a step that a
    gradient scaler skipped are pushed, because they are valid embeddings; the queue masks keys that are not finite.

    Raises:
        TypeError: If the module has no ``queues``, or its training step does not return a dict.
        ValueError: If a queue is not a submodule of the module, the step output lacks an entry, or more keys are pushed
            at once than the queue has rows; the latter before the first step if the loader has a batch size.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check and shard the queues, and exclude their buffers from DDP, which would broadcast them in every step."""
        if remove_if_other_module(self, trainer, pl_module) or stage != "fit":
            return
        names = {id(module): name for name, module in pl_module.named_modules()}
        ignored: list[str] = list(getattr(pl_module, _IGNORED_BY_DDP, []))
        for name, queue in _queues(pl_module).items():
            if id(queue) not in names:
                hint = "Assign it to an attribute in `__init__`, so that checkpoints and strategies include it"
                fail("queues", "return submodules of the module", name, hint)
            if isinstance(queue, FeatureQueue):
                queue.shard()
            ignored += [f"{names[id(queue)]}.{buffer}" for buffer, _ in queue.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, sorted(set(ignored)))  # type: ignore[no-untyped-call]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a queue that is smaller than a batch of all ranks, if the loader has a batch size."""
        images = _batch_size(trainer.train_dataloader)
        if images is None:
            return
        keys = images * trainer.world_size * getattr(pl_module, "keys_per_image", 1)
        for queue in _queues(pl_module).values():
            size = getattr(queue, "size", None)
            if isinstance(size, int) and keys > size:
                raise ValueError(f"Cannot push {keys} keys into a queue of size {size}; raise `queue_size`.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Push the keys of all ranks."""
        if not outputs or step_was_skipped(trainer) or only_forward(trainer):
            return
        for name, queue in _queues(pl_module).items():
            keys = distributed.gather(_output(outputs, name))
            if isinstance(queue, MemoryBank):
                indices = distributed.gather(_output(outputs, "indices"))
                if batch_idx == 0:
                    queue.check_indices(indices)  # synchronizes with the device, hence not in every step
                queue.push(keys, indices)
            elif getattr(queue, "labels", None) is not None:
                queue.push(keys, distributed.gather(_output(outputs, f"{name}_labels")))  # type: ignore[operator]
            else:
                queue.push(keys)  # type: ignore[operator]  # any module with this method


def _batch_size(loader: Any) -> int | None:
    """Return the number of images in the largest batch of a loader, or None without a batch size."""
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(size, int):
        return None
    sampler: Any = getattr(loader, "sampler", None)
    return min(size, len(sampler)) if hasattr(sampler, "__len__") else size  # a dataset may be smaller than a batch


def _queues(pl_module: LightningModule) -> dict[str, nn.Module]:
    """Return the queues by the name of their step output."""
    if not hasattr(pl_module, "queues"):
        hint = 'Return {"keys": queue} from it, or leave `QueueUpdate` out'
        fail("pl_module", "have a method `queues`", type(pl_module).__name__, hint, TypeError)
    queues: dict[str, nn.Module] = pl_module.queues()  # type: ignore[operator]  # checked above
    if not queues:
        fail("queues", "return at least one queue", queues, "Leave `QueueUpdate` out")
    return queues


def _output(outputs: Any, name: str) -> Tensor:
    """Return an entry of the step output, or raise an error that lists the entries."""
    if not isinstance(outputs, dict):
        hint = f'Return {{"loss": loss, "{name}": ...}} from `training_step`'
        fail("outputs", "be a dict", type(outputs).__name__, hint, TypeError)
    value = outputs.get(name)
    if not isinstance(value, Tensor):
        there = ", ".join(map(repr, outputs))
        fail("training_step", f"return a tensor {name!r} for its queue", there, f"Add {name!r} to the dict it returns")
    return value
