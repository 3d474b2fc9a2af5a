"""Feature hooks: read the features of one step from any module, through its step output or a forward hook."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NoReturn, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_contrast._checks import check_choice, fail, require
from lightning_contrast.contracts import split_batch
from lightning_contrast.sharding import clean_name

OUTPUT_KEY = "features"
OUTPUT_NAMES = ("backbone", OUTPUT_KEY)
"""Names for which the step output ``"features"`` takes precedence over a layer of that name."""

Unusable: TypeAlias = torch.Size | type
"""The shape of an output that does not fit the images, or the type of an output that is not a tensor."""


class FeatureHook:
    """Record the features of the images of one step, at the cost of one forward hook and no further forward pass.

    The layer is looked up by name at each `attach`, since strategies and SyncBatchNorm replace modules. The first call
    of the layer in a step whose number of rows is a multiple of the batch size is recorded; of more rows than images
    (several views in one pass, one view after the other) the first view is used. Later calls and the recomputation
    under activation checkpointing are ignored, because the hook is disarmed by then.

    Args:
        features: Name of a submodule, as in ``named_modules``. "backbone" and "features" mean the step output
            ``"features"`` if there is one.
        tokens: Pooling of a token sequence (B, N, D): "mean" over all tokens, or "cls", the first token. A feature map
            (B, C, H, W) is averaged over its positions.

    Attributes:
        paused: True while a forward pass of another callback runs; such passes are not recorded.

    Raises:
        TypeError: If ``features`` is not a str.
        ValueError: If ``features`` is empty or ``tokens`` is unknown.
    """

    def __init__(self, features: str, tokens: str = "mean") -> None:
        if not isinstance(features, str):
            fail("features", "be the name of a submodule", type(features).__name__, 'Write "backbone"', TypeError)
        require(features != "", "features", "be the name of a submodule", features, 'Write "backbone"')
        check_choice("tokens", tokens, ("mean", "cls"))
        self.features, self.tokens = features, tokens
        self.paused = False
        self._layer: nn.Module | None = None
        self._handle: RemovableHandle | None = None
        self._rows = 0
        self._armed = False
        self._recorded: Tensor | None = None
        self._unusable: Unusable | None = None

    def attach(self, module: nn.Module) -> None:
        """Hook the layer, unless it is hooked already.

        Args:
            module: The LightningModule, after `configure_model` and the strategy's wrapping.

        Raises:
            ValueError: If there is no such layer; the message lists similar names.
        """
        layers = named_layers(module)
        layer = layers.get(self.features)
        if layer is None and self.features not in OUTPUT_NAMES:
            self._fail_unknown(module, layers)
        if layer is self._layer:
            return
        self.detach()
        if layer is not None:
            self._layer, self._handle = layer, layer.register_forward_hook(self._on_forward)

    def detach(self) -> None:
        """Remove the forward hook."""
        if self._handle is not None:
            self._handle.remove()
        self._layer = self._handle = self._recorded = None
        self._armed = False

    def arm(self, rows: int) -> None:
        """Record the features of ``rows`` images in the next step."""
        self._rows, self._armed = rows, True
        self._recorded = self._unusable = None

    def called(self, outputs: Any = None) -> bool:
        """Return whether the step gave an output to `read`, usable or not.

        Args:
            outputs: The step output.
        """
        given = self.features in OUTPUT_NAMES and isinstance(outputs, Mapping) and OUTPUT_KEY in outputs
        return given or self._recorded is not None or self._unusable is not None

    def read(self, module: nn.Module, outputs: Any) -> Tensor:
        """Return the features of the step that has just ended.

        Args:
            module: The LightningModule, named in errors.
            outputs: The step output.

        Returns:
            Features ``(B, F)``, float32, a detached copy.

        Raises:
            TypeError: If the layer or the step returned something other than a tensor.
            ValueError: If there are no features, or those of another number of images.
        """
        recorded, unusable = self._recorded, self._unusable
        self._armed, self._recorded = False, None
        if self.features in OUTPUT_NAMES and isinstance(outputs, Mapping) and OUTPUT_KEY in outputs:
            found = outputs[OUTPUT_KEY]
            if not isinstance(found, Tensor):
                hint = "Return the backbone's features (B, F) under that key"
                fail(f'the step output "{OUTPUT_KEY}"', "be a tensor", type(found).__name__, hint, TypeError)
            pooled = pool(found, self._rows, self.tokens)
            if pooled is None:
                self._fail_rows(found.shape)
            return pooled
        if recorded is not None:
            return recorded
        if self._layer is None:
            self._fail_unknown(module, named_layers(module))
        if unusable is None:
            hint = "Name a layer that the training and validation steps use"
            fail("features", "name a layer that is called in each step", self.features, hint)
        if isinstance(unusable, torch.Size):
            self._fail_rows(unusable)
        hint = "Name a layer that returns one tensor"
        rule = f"name a layer that returns a tensor ({self.features!r} does not)"
        fail("features", rule, unusable.__name__, hint, TypeError)

    def _on_forward(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._armed and not self.paused:
            self._record(output)

    def _record(self, output: Any) -> None:
        if not isinstance(output, Tensor):
            self._unusable = type(output)
            return
        pooled = pool(output, self._rows, self.tokens)
        if pooled is None:
            self._unusable = output.shape
            return
        self._recorded, self._armed = pooled, False

    def _fail_rows(self, shape: torch.Size) -> NoReturn:
        rule = f"give features of {self._rows} images, one row per label"
        hint = "Expected (B, F), (B, N, D) or (B, C, H, W); name another layer, or check `labels`"
        raise ValueError(f"`features` {self.features!r} must {rule}, got the shape {tuple(shape)}. {hint}.")

    def _fail_unknown(self, module: nn.Module, layers: dict[str, nn.Module]) -> NoReturn:
        near = get_close_matches(self.features, layers, n=5, cutoff=0.5)
        children = [name for name in layers if "." not in name]
        hint = f"Near names: {', '.join(map(repr, near))}. " if near else ""
        hint = f"{hint}It has {', '.join(map(repr, children))} and their submodules"
        if self.features in OUTPUT_NAMES:
            hint += f'; or return "{OUTPUT_KEY}" from the steps'
        fail("features", f"name a submodule of {type(module).__name__}", self.features, hint)


def attached_hooks(module: nn.Module) -> list[FeatureHook]:
    """Return the feature hooks of all callbacks on the layers of a module."""
    functions = (function for layer in module.modules() for function in layer._forward_hooks.values())
    owners = (getattr(function, "__self__", None) for function in functions)
    return [owner for owner in owners if isinstance(owner, FeatureHook)]


@contextmanager
def paused_hooks(module: nn.Module, but: Sequence[FeatureHook] = ()) -> Iterator[None]:
    """Record no features in a block, such as further forward passes of a step, except with some hooks.

    Args:
        module: The LightningModule.
        but: The hooks that record; all others on the module are paused.
    """
    hooks = attached_hooks(module)
    before = [hook.paused for hook in hooks]
    for hook in hooks:
        hook.paused = not any(hook is own for own in but)
    try:
        yield
    finally:
        for hook, paused in zip(hooks, before, strict=True):
            hook.paused = paused


def named_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules by name, without the parts that wrappers (compile, FSDP, checkpointing) insert."""
    layers: dict[str, nn.Module] = {}
    for name, layer in module.named_modules():
        own_name = clean_name(name)
        if own_name:
            layers.setdefault(own_name, layer)  # the outermost: a wrapper comes before the wrapped module
    return layers


def pool(output: Tensor, rows: int, tokens: str) -> Tensor | None:
    """Pool an output to one float32 vector for each of the first ``rows`` images.

    Args:
        output: ``(n B, F)``, tokens ``(n B, N, D)`` or a map ``(n B, C, H, W)``; n views, one after the other.
        rows: Number of images B.
        tokens: "mean" or "cls".

    Returns:
        A copy ``(B, F)``, which later in-place operations on ``output`` do not change; None for any other shape.
    """
    fits = len(output) > 0 and len(output) % rows == 0 if rows else len(output) == 0  # a rank's batch may be empty
    if output.ndim not in (2, 3, 4) or not fits:
        return None
    first = output.detach()[:rows].to(torch.float32, copy=True)
    if first.ndim == 3:
        return first[:, 0] if tokens == "cls" else first.mean(dim=1)
    return first.mean(dim=(2, 3)) if first.ndim == 4 else first


def warn_of_nan(owner: Any, layer: str, finite: Tensor, where: str = "") -> bool:
    """Warn of images whose features are not finite.

    Args:
        owner: The callback; its ``name`` is the prefix of its log keys.
        layer: Layer of the features.
        finite: ``(N,)``, bool.
        where: Description of the batch for the message, with a leading space.

    Returns:
        Whether there were such images.
    """
    bad = len(finite) - int(finite.sum())
    if bad:
        rank_zero_warn(
            f"{type(owner).__name__}: the features {layer!r} of {bad} of {len(finite)} images are NaN or infinite"
            f"{where}; `{owner.name}` leaves such images out. Check the loss and the learning rate."
        )
    return bad > 0


class ViewHook(FeatureHook):
    """Record the outputs of a layer for all views of the images of one step.

    All calls of the layer whose number of rows is a multiple of the batch size count, in call order; the rows of one
    call are the views one after the other. Two calls with (B, D) and one call with (2 B, D) give the same result.

    Args:
        features: Name of a submodule, as in ``named_modules``.
        limit: Maximum number of views; the first ones are kept.
        only_rows: Maximum number of rows per view; the first ones are kept. None keeps all.

    Raises:
        TypeError: If ``features`` is not a str.
        ValueError: If ``features`` is empty.
    """

    def __init__(self, features: str, *, limit: int = 2, only_rows: int | None = None) -> None:
        super().__init__(features)
        self.limit, self.only_rows = limit, only_rows
        self._views: list[Tensor] = []

    def arm(self, rows: int) -> None:
        """Record the outputs for ``rows`` images in the next step."""
        super().arm(rows)
        self._views = []

    def disarm(self) -> None:
        """Record nothing, and drop what was recorded."""
        self._armed, self._views = False, []

    def read_views(self) -> Tensor | None:
        """Return the views of the step that has just ended.

        Returns:
            ``(V, R, D)``, float32, a detached copy: V views of the first R images; None if the layer was not called or
            returned no such tensor.
        """
        views, self._armed, self._views = self._views, False, []
        shapes = {view.shape for view in views}
        return torch.stack(views[: self.limit]) if len(shapes) == 1 else None

    def refused(self) -> str | None:
        """Return the type or shape of an output of the last step that does not fit the images, if there was one."""
        if self._unusable is None:
            return None
        return str(tuple(self._unusable)) if isinstance(self._unusable, torch.Size) else self._unusable.__name__

    def _record(self, output: Any) -> None:
        if len(self._views) >= self.limit:
            return
        if not isinstance(output, Tensor) or output.ndim < 2 or self._rows == 0 or len(output) % self._rows:
            self._unusable = output.shape if isinstance(output, Tensor) else type(output)
            return
        for view in torch.split(output.detach(), self._rows)[: self.limit - len(self._views)]:
            pooled = pool(view[: self.only_rows], len(view[: self.only_rows]), self.tokens)
            if pooled is not None:
                self._views.append(pooled)


def count_images(batch: Any) -> int:
    """Return the number of images of a batch; for other batches, the number of rows of the first tensor.

    Args:
        batch: Any batch.

    Returns:
        The number, 0 without a tensor.
    """
    try:
        images, _ = split_batch(batch)
    except TypeError:
        return _first_rows(batch)
    return len(images) if isinstance(images, Tensor) else len(images[0])


def _first_rows(value: Any) -> int:
    if isinstance(value, Tensor):
        return len(value) if value.ndim else 0
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return next((rows for rows in map(_first_rows, value) if rows), 0)
    return 0
