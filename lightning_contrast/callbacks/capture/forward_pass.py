"""Additional forward passes of a callback, which leave the run unchanged."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from lightning_contrast._checks import fail
from lightning_contrast.callbacks.capture.features import OUTPUT_KEY, OUTPUT_NAMES, FeatureHook, attached_hooks
from lightning_contrast.contracts import split_batch


@contextmanager
def extra_pass(trainer: Any, module: nn.Module, hooks: Sequence[FeatureHook]) -> Iterator[None]:
    """Put all modules into eval mode and the Trainer into validation, and restore both afterwards.

    BatchNorm statistics do not change, no gradient is recorded, and a batch that is moved to the device gets the
    unaugmented images of `ViewAugmentation`. Random numbers are not isolated here: see `isolated`.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        hooks: Hooks that record this pass; all others on the module are paused.
    """
    root = trainer.strategy.model
    roots = [module] if root is None or root is module else [module, root]
    modes = {layer: layer.training for one in roots for layer in one.modules()}
    stage = trainer.state.stage
    attached = attached_hooks(module)
    were_paused = [hook.paused for hook in attached]
    for layer in modes:
        layer.training = False  # not `eval()`, which a module may have overridden
    for hook in attached:
        hook.paused = not any(hook is own for own in hooks)
    if stage is not None:
        trainer.state.stage = type(stage).VALIDATING
    try:
        with torch.no_grad():
            yield
    finally:
        trainer.state.stage = stage
        for hook, paused in zip(attached, were_paused, strict=True):
            hook.paused = paused
        for layer, mode in modes.items():
            layer.training = mode
            if isinstance(layer, FSDPModule):
                layer.reshard()  # a forward pass without backward leaves the outermost parameters unsharded


def encode(trainer: Any, module: Any, hooks: Sequence[FeatureHook], batch: Any) -> tuple[list[Tensor], Any]:
    """Compute the features of a batch, inside `extra_pass`.

    The images are given to the module's ``forward``. Without one, or if it does not accept images (as in a generator),
    they are given to the submodule that contains the first hooked layer. A hooked layer that neither calls, such as a
    projector, is applied to the result.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        hooks: The attached hooks of the layers.
        batch: A batch of the contract, as its loader gives it; of a list of views the first is used.

    Returns:
        Features ``(B, F)``, float32, per hook, and the batch on the device.
    """
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
    images, _ = split_batch(batch)
    images = images if isinstance(images, Tensor) else images[0]
    with trainer.precision_plugin.forward_context():
        output = _call(trainer, module, hooks, images)
        outputs = {OUTPUT_KEY: output} if isinstance(output, Tensor) else None
        complete(trainer, hooks, outputs)
    return [hook.read(module, None if hook.called() else outputs) for hook in hooks], batch


def complete(trainer: Any, hooks: Sequence[FeatureHook], outputs: Any) -> None:
    """Apply the hooked layers that a step did not call to its output ``"features"``, if there is one.

    Args:
        trainer: The Trainer.
        hooks: The attached hooks of the layers, armed.
        outputs: The step output.
    """
    features = outputs.get(OUTPUT_KEY) if isinstance(outputs, dict) else None
    left_out = [hook for hook in hooks if not hook.called(outputs)]
    if isinstance(features, Tensor) and left_out:
        with _full_parameters(trainer.strategy.model):
            for hook in left_out:
                hook.run(features)


def _full_parameters(root: Any) -> AbstractContextManager[Any]:
    """Gather the parameters that FSDP1 shards in the outermost wrapper, so that a layer can be called on its own."""
    if not isinstance(root, FullyShardedDataParallel):
        return nullcontext()
    full: AbstractContextManager[Any] = FullyShardedDataParallel.summon_full_params(
        root, recurse=False, writeback=False
    )
    return full


def _call(trainer: Any, module: Any, hooks: Sequence[FeatureHook], images: Tensor) -> Any:
    """Run the images through the module that computes the features."""
    layer = hooks[0].features
    child = getattr(module, layer.split(".", maxsplit=1)[0], None)
    entries = [child] if isinstance(child, nn.Module) else []
    if type(module).forward.__qualname__ != "LightningModule.forward":
        root = trainer.strategy.model
        # Not through DDP's wrapper, which broadcasts BatchNorm statistics; through FSDP1's, which gathers the weights
        entries.insert(0, root if isinstance(root, FullyShardedDataParallel) else module)
    if not entries:
        names = " or ".join(map(repr, OUTPUT_NAMES))
        hint = f"Define `forward(images)` in the module, or name a layer other than {names}"
        fail("features", "be computed by `forward` or a submodule", layer, hint)
    _arm(hooks, images)
    try:
        return entries[0](images)
    except (RuntimeError, TypeError) as error:
        if len(entries) == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        _arm(hooks, images)
        return entries[1](images)


def _arm(hooks: Sequence[FeatureHook], images: Tensor) -> None:
    for hook in hooks:
        hook.arm(len(images))
