"""A forward pass that is not the run's own, and that the run does not notice."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from lightning_contrast._checks import fail
from lightning_contrast.callbacks.capture.features import OUTPUT_KEY, OUTPUT_NAMES, FeatureHook
from lightning_contrast.contracts import split_batch


@contextmanager
def extra_pass(trainer: Any, module: nn.Module, hooks: Sequence[FeatureHook]) -> Iterator[None]:
    """Put all modules into eval mode and the Trainer into validation, and everything back afterwards.

    BatchNorm statistics stay as they are, no gradient is recorded, and a batch that is moved to the device gets the
    plain images of `ViewAugmentation`. Random numbers are not isolated here: see `isolated`.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        hooks: Hooks that record this pass; all others ignore it.
    """
    root = trainer.strategy.model
    roots = [module] if root is None or root is module else [module, root]
    modes = {layer: layer.training for one in roots for layer in one.modules()}
    stage = trainer.state.stage
    for layer in modes:
        layer.training = False  # not `eval()`, which a module may have overridden
    for tap in hooks:
        tap.joins = True
    FeatureHook.extra_pass = True
    if stage is not None:
        trainer.state.stage = type(stage).VALIDATING
    try:
        with torch.no_grad():
            yield
    finally:
        trainer.state.stage = stage
        FeatureHook.extra_pass = False
        for tap in hooks:
            tap.joins = False
        for layer, mode in modes.items():
            layer.training = mode
            if isinstance(layer, FSDPModule):
                layer.reshard()  # a forward pass without a backward leaves the outermost ones whole


def encode(trainer: Any, module: Any, hooks: Sequence[FeatureHook], batch: Any) -> tuple[list[Tensor], Any]:
    """Return the features of a batch, inside `extra_pass`.

    The module's ``forward`` gets the images; where it has none, or one that does not take them (a generator's), the
    submodule that holds the first tapped layer does. A layer that this does not call (a projector) gets what it
    returns.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        hooks: The attached hooks of the layers.
        batch: A batch of the contract, as its loader gives it; of a list of views the first counts.

    Returns:
        Features (B, F), float32, for each tap, and the batch on the device.
    """
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
    images, _ = split_batch(batch)
    images = images if isinstance(images, Tensor) else images[0]
    with trainer.precision_plugin.forward_context():
        output = _call(trainer, module, hooks, images)
        outputs = {OUTPUT_KEY: output} if isinstance(output, Tensor) else None
        complete(trainer, hooks, outputs)
    return [tap.read(module, None if tap.called() else outputs) for tap in hooks], batch


def complete(trainer: Any, hooks: Sequence[FeatureHook], outputs: Any) -> None:
    """Run the layers that a step has not called on its output ``"features"``, where it has one.

    Args:
        trainer: The Trainer.
        hooks: The attached hooks of the layers, armed.
        outputs: What the step returned.
    """
    features = outputs.get(OUTPUT_KEY) if isinstance(outputs, dict) else None
    left_out = [tap for tap in hooks if not tap.called(outputs)]
    if isinstance(features, Tensor) and left_out:
        with _whole(trainer.strategy.model):
            for tap in left_out:
                tap.run(features)


def _whole(root: Any) -> AbstractContextManager[Any]:
    """Let a layer be called by itself whose weights FSDP1 keeps in pieces in the outermost wrapper."""
    if not isinstance(root, FullyShardedDataParallel):
        return nullcontext()
    whole: AbstractContextManager[Any] = FullyShardedDataParallel.summon_full_params(
        root, recurse=False, writeback=False
    )
    return whole


def _call(trainer: Any, module: Any, hooks: Sequence[FeatureHook], images: Tensor) -> Any:
    """Send the images through what turns them into features."""
    layer = hooks[0].features
    child = getattr(module, layer.split(".", maxsplit=1)[0], None)
    entries = [child] if isinstance(child, nn.Module) else []
    if type(module).forward.__qualname__ != "LightningModule.forward":
        root = trainer.strategy.model
        # DDP's wrapper would send BatchNorm's statistics from rank 0 to the others; FSDP1's has to gather the weights
        entries.insert(0, root if isinstance(root, FullyShardedDataParallel) else module)
    if not entries:
        names = " or ".join(map(repr, OUTPUT_NAMES))
        hint = f"Define `forward(images)` in the module, or name a layer instead of {names}"
        fail("features", "be found by a forward pass of its own", layer, hint)
    _arm(hooks, images)
    try:
        return entries[0](images)
    except (RuntimeError, TypeError) as error:
        if len(entries) == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        _arm(hooks, images)
        return entries[1](images)


def _arm(hooks: Sequence[FeatureHook], images: Tensor) -> None:
    for tap in hooks:
        tap.arm(len(images))
