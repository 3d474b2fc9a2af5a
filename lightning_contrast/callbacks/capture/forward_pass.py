"""Additional forward passes of a callback, which leave the run unchanged."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from lightning_contrast._checks import fail
from lightning_contrast.callbacks.capture.features import (
    OUTPUT_KEY,
    OUTPUT_NAMES,
    FeatureHook,
    paused_hooks,
)
from lightning_contrast.callbacks.capture.labels import Source, find_images

MOMENTUM = "momentum_"
"""Prefix of the names of a method's momentum modules."""

FORWARD_FEATURES = "forward_gives_features"
"""Attribute of a module; True if ``forward`` returns the step output ``"features"``, whatever the backbone's is."""

ORDER = ("backbone", "projector", "predictor")
"""Names of a method's modules in the order in which its images pass through them."""


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
    for layer in modes:
        layer.training = False  # not `eval()`, which a module may have overridden
    if stage is not None:
        trainer.state.stage = type(stage).VALIDATING
    try:
        with paused_hooks(module, but=hooks), torch.no_grad():
            yield
    finally:
        trainer.state.stage = stage
        for layer, mode in modes.items():
            layer.training = mode
            if isinstance(layer, FSDPModule):
                layer.reshard()  # a forward pass without backward leaves the outermost parameters unsharded


def encode(
    trainer: Any, module: Any, hooks: Sequence[FeatureHook], batch: Any, images: Source = None
) -> tuple[list[Tensor], Any]:
    """Compute the features of a batch of a loader, inside `extra_pass`.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        hooks: The attached hooks of the layers.
        batch: A batch as its loader gives it.
        images: Where its images are, see `find_images`.

    Returns:
        Features ``(B, F)``, float32, per hook, and the batch on the device.
    """
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
    return encode_images(trainer, module, hooks, find_images(batch, images)), batch


def encode_images(trainer: Any, module: Any, hooks: Sequence[FeatureHook], images: Tensor) -> list[Tensor]:
    """Compute the features of images, inside `extra_pass`.

    The images are given to the module's ``forward``. Without one, or if it does not accept images (as in a generator),
    they are given to the submodule that contains the first hooked layer. A hooked layer that is not called, such as a
    projector or a momentum network, is reached as `complete` says. In a module with ``forward_gives_features`` the
    output of ``forward`` is the step output ``"features"``, which takes precedence over the backbone's.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        hooks: The attached hooks of the layers.
        images: ``(B, C, H, W)``, on the device.

    Returns:
        Features ``(B, F)``, float32, per hook.
    """
    for hook in hooks:
        hook.arm(len(images))
    outputs: dict[str, Any] | None = None
    known: dict[str, Any] = {}
    gives_features = getattr(module, FORWARD_FEATURES, False)
    with trainer.precision_plugin.forward_context():
        if not all(_of_momentum_network(module, hook.features) for hook in hooks):
            with _outputs_of_backbone(module, known):
                output = _call(trainer, module, hooks, images)
            outputs = {OUTPUT_KEY: output} if isinstance(output, Tensor) else None
            if gives_features:
                known[ORDER[0]] = output  # what the projector takes
        complete(trainer, module, hooks, outputs, lambda: images, known)
    return [hook.read(module, outputs if gives_features or not hook.called() else None) for hook in hooks]


def complete(
    trainer: Any,
    module: Any,
    hooks: Sequence[FeatureHook],
    outputs: Any,
    images: Callable[[], Tensor],
    known: dict[str, Any] | None = None,
) -> None:
    """Reach the hooked layers that a step did not call by the modules before them.

    The input of a layer is known by its name: a projector takes the output of the backbone, a predictor that of the
    projector, and ``momentum_projector`` that of ``momentum_backbone``, which takes the images. No other layer is
    called, whatever the width of its input: a layer fits many inputs that are not its own.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        hooks: The attached hooks of the layers, armed.
        outputs: The step output, whose ``"features"`` are the output of the backbone.
        images: Returns the images of the step, ``(B, C, H, W)``.
        known: Outputs of direct submodules by name; None takes the backbone's from ``outputs``.

    Raises:
        ValueError: If a layer does not accept the output of the module before it.
    """
    left_out = [hook for hook in hooks if not hook.called(outputs)]
    if not left_out:
        return
    features = outputs.get(OUTPUT_KEY) if isinstance(outputs, dict) else None
    if known is None:
        known = {"backbone": features} if isinstance(features, Tensor) and features.ndim == 2 else {}
    with _full_parameters(trainer.strategy.model):
        for hook in left_out:
            _follow(module, hook, images, known)


def _follow(module: Any, hook: FeatureHook, images: Callable[[], Tensor], known: dict[str, Any]) -> None:
    """Call the modules from the images to a layer, as far as their outputs are not known."""
    path = path_to(module, hook.features)
    value: Any = None
    for place, name in enumerate(path):
        if name in known and place < len(path) - 1:
            value = known[name]
            continue
        given = images() if place == 0 else value
        try:
            value = known[name] = getattr(module, name)(given)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            source = "the images" if place == 0 else f"the output of {path[place - 1]!r}"
            rule = f"name a layer that the step calls, or that takes {source} {tuple(given.shape)}"
            hint = "Call it in the validation step, or name another layer"
            raise ValueError(f"`features` must {rule}, got {hook.features!r}. {hint}.") from error


def path_to(module: Any, layer: str) -> list[str]:
    """Return the direct submodules that lead from the images to a layer, by the names that methods give them.

    Args:
        module: The LightningModule.
        layer: Name of the layer.

    Returns:
        Names in the order of their calls, such as ``["momentum_backbone", "momentum_projector"]``; empty if unknown.
    """
    top = layer.split(".", maxsplit=1)[0]
    plain = top.removeprefix(MOMENTUM)
    prefix = top[: len(top) - len(plain)]
    if plain not in ORDER:
        return []
    path = [prefix + name for name in ORDER[: ORDER.index(plain) + 1]]
    return path if all(isinstance(getattr(module, name, None), nn.Module) for name in path) else []


def _of_momentum_network(module: Any, layer: str) -> bool:
    return layer.startswith(MOMENTUM) and bool(path_to(module, layer))


@contextmanager
def _outputs_of_backbone(module: Any, known: dict[str, Any]) -> Iterator[None]:
    """Keep the output of the backbone in a forward pass, for the layers after it."""
    backbone = getattr(module, ORDER[0], None)
    if not isinstance(backbone, nn.Module):
        yield
        return

    def keep(layer: nn.Module, given: Any, output: Any) -> None:
        known[ORDER[0]] = output

    handle = backbone.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


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
    try:
        return entries[0](images)
    except (RuntimeError, TypeError) as error:
        if len(entries) == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        for hook in hooks:
            hook.arm(len(images))
        return entries[1](images)
