"""Reads the features of one step out of any module: from what the step returns, or with a forward hook on a layer."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_contrast._checks import check_choice, fail, require
from lightning_contrast.contracts import split_batch

OUTPUT_KEY = "features"
OUTPUT_NAMES = ("backbone", OUTPUT_KEY)
"""Names for which the step's own output ``"features"`` comes before a layer of that name."""

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


class FeatureHook:
    """Takes the features of the images of one step, at the price of one hook and no further forward pass.

    The layer is found by name whenever the tap is attached, since strategies and SyncBatchNorm replace modules. Of the
    calls of the layer in one step the first counts whose rows are a multiple of the batch; of more rows than images
    (several views in one pass, one view after the other) the first view is taken. Later calls and the recomputation
    under activation checkpointing find the tap unarmed.

    Args:
        features: Name of a submodule, as ``named_modules`` gives it. "backbone" and "features" stand for the step
            output ``"features"`` where there is one.
        tokens: What becomes of a token sequence (B, N, D): "mean" over all tokens, or "cls", the first token. A map
            (B, C, H, W) is averaged over its places.
    """

    extra_pass: ClassVar[bool] = False
    """True during a forward pass that is not the step's own: only taps that join it read."""

    def __init__(self, features: str, tokens: str = "mean") -> None:
        if not isinstance(features, str):
            fail("features", "be the name of a submodule", type(features).__name__, 'Write "backbone"', TypeError)
        require(features != "", "features", "be the name of a submodule", features, 'Write "backbone"')
        check_choice("tokens", tokens, ("mean", "cls"))
        self.features, self.tokens = features, tokens
        self._layer: nn.Module | None = None
        self._handle: RemovableHandle | None = None
        self._rows = 0
        self._armed = False
        self._taken: Tensor | None = None
        self._refused: str | None = None
        self.joins = False

    def attach(self, module: nn.Module) -> None:
        """Hook the layer of that name, unless it is hooked already.

        Args:
            module: The LightningModule, after `configure_model` and the strategy's wrapping.

        Raises:
            ValueError: If there is no such layer; the message lists near names.
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
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
        self._layer = self._handle = self._taken = None
        self._armed = False

    def arm(self, rows: int) -> None:
        """Expect the features of ``rows`` images in the coming step."""
        self._rows, self._armed = rows, True
        self._taken = self._refused = None

    def called(self, outputs: Any = None) -> bool:
        """Tell whether the step has given `read` anything, be it features or something else that it will name.

        Args:
            outputs: What the step returned.
        """
        given = self.features in OUTPUT_NAMES and isinstance(outputs, Mapping) and OUTPUT_KEY in outputs
        return given or self._taken is not None or self._refused is not None

    def run(self, features: Tensor) -> None:
        """Call the layer, which the step has left out, on features of the images.

        Args:
            features: What the layer takes, (B, ...).

        Raises:
            ValueError: If it does not take them.
        """
        if self._layer is None:
            return
        try:
            self._layer(features)
        except RuntimeError as error:
            hint = "Call it in the validation step, or name another layer"
            rule = f"name a layer that the step calls, or that takes the features {tuple(features.shape)}"
            raise ValueError(f"`features` must {rule}, got {self.features!r}. {hint}.") from error

    def read(self, module: nn.Module, outputs: Any) -> Tensor:
        """Return the features of the step that has just ended.

        Args:
            module: The LightningModule, named in errors.
            outputs: What the step returned.

        Returns:
            Features (B, F), float32, detached, with memory of their own.

        Raises:
            TypeError: If the layer or the step gave something other than a tensor.
            ValueError: If there are no features, or of another number of images.
        """
        taken, refused = self._taken, self._refused
        self._armed, self._taken = False, None
        if self.features in OUTPUT_NAMES and isinstance(outputs, Mapping) and OUTPUT_KEY in outputs:
            found = outputs[OUTPUT_KEY]
            if not isinstance(found, Tensor):
                hint = "Return the backbone's features (B, F) under that key"
                fail(f'the step output "{OUTPUT_KEY}"', "be a tensor", type(found).__name__, hint, TypeError)
            pooled = pool(found, self._rows, self.tokens)
            return self._fail_rows(str(tuple(found.shape))) if pooled is None else pooled
        if taken is not None:
            return taken
        if self._layer is None:
            self._fail_unknown(module, named_layers(module))
        if refused is None:
            hint = "Name a layer that the training and validation steps use"
            fail("features", "name a layer that is called in each step", self.features, hint)
        if refused.startswith("("):
            self._fail_rows(refused)
        hint = "Name a layer that returns one tensor"
        fail("features", f"name a layer that returns a tensor ({self.features!r} does not)", refused, hint, TypeError)

    def _on_forward(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self.joins or not FeatureHook.extra_pass:
            self._hook(layer, args, output)

    def _hook(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not self._armed:
            return
        if not isinstance(output, Tensor):
            self._refused = type(output).__name__
            return
        pooled = pool(output, self._rows, self.tokens)
        if pooled is None:
            self._refused = str(tuple(output.shape))
            return
        self._taken, self._armed = pooled, False

    def _fail_rows(self, shape: str) -> Tensor:
        rule = f"give features of {self._rows} images, one row for each label"
        hint = "Expected (B, F), (B, N, D) or (B, C, H, W); name another layer, or mend `labels`"
        raise ValueError(f"`features` {self.features!r} must {rule}, got the shape {shape}. {hint}.")

    def _fail_unknown(self, module: nn.Module, layers: dict[str, nn.Module]) -> Any:
        near = get_close_matches(self.features, layers, n=5, cutoff=0.5)
        children = [name for name in layers if "." not in name]
        hint = f"Near names: {', '.join(map(repr, near))}. " if near else ""
        hint = f"{hint}It has {', '.join(map(repr, children))} and what lies below them"
        if self.features in OUTPUT_NAMES:
            hint += f'; or return "{OUTPUT_KEY}" from the steps'
        fail("features", f"name a submodule of {type(module).__name__}", self.features, hint)


def named_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules by name, without the names that wrappers (compile, FSDP, checkpointing) add."""
    layers: dict[str, nn.Module] = {}
    for name, layer in module.named_modules():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain:
            layers.setdefault(plain, layer)  # the outermost: a wrapper comes before what it wraps
    return layers


def pool(output: Tensor, rows: int, tokens: str) -> Tensor | None:
    """Return one float32 vector for each of the first ``rows`` images, or None where the shape does not allow it.

    Args:
        output: (n B, F), tokens (n B, N, D) or a map (n B, C, H, W); n views, one after the other.
        rows: B.
        tokens: "mean" or "cls".

    Returns:
        A copy (B, F), which a later in-place operation on ``output`` does not change.
    """
    fits = len(output) > 0 and len(output) % rows == 0 if rows else len(output) == 0  # a rank's batch may be empty
    if output.ndim not in (2, 3, 4) or not fits:
        return None
    first = output.detach()[:rows].to(torch.float32, copy=True)
    if first.ndim == 3:
        return first[:, 0] if tokens == "cls" else first.mean(dim=1)
    return first.mean(dim=(2, 3)) if first.ndim == 4 else first


def warn_of_nan(owner: Any, layer: str, finite: Tensor, where: str = "") -> bool:
    """Warn of images whose features are not finite, and tell whether there were any.

    Args:
        owner: The callback, by whose ``name`` its figures go.
        layer: Where the features are from.
        finite: (N,), bool.
        where: Words for the batch, with a space before them.
    """
    bad = len(finite) - int(finite.sum())
    if bad:
        rank_zero_warn(
            f"{type(owner).__name__}: the features {layer!r} of {bad} of {len(finite)} images are NaN or infinite"
            f"{where}; `{owner.name}` leaves such images out. Look at the loss and the learning rate."
        )
    return bad > 0


class ViewHook(FeatureHook):
    """Takes the outputs of a layer for all views of the images of one step.

    All calls of the layer count whose rows are a multiple of the batch, in their order; the rows of one call are the
    views one after the other. So two calls with (B, D) and one call with (2 B, D) give the same.

    Args:
        features: Name of a submodule, as ``named_modules`` gives it.
        limit: Views kept at most, the first ones.
        only_rows: Rows kept of each view, the first ones; None keeps all.
    """

    def __init__(self, features: str, *, limit: int = 2, only_rows: int | None = None) -> None:
        super().__init__(features)
        self.limit, self.only_rows = limit, only_rows
        self._views: list[Tensor] = []

    def arm(self, rows: int) -> None:
        """Expect the outputs for ``rows`` images in the coming step."""
        super().arm(rows)
        self._views = []

    def disarm(self) -> None:
        """Expect nothing."""
        self._armed, self._views = False, []

    def read_views(self) -> Tensor | None:
        """Return the views of the step that has just ended.

        Returns:
            ``(V, R, D)``, float32, detached, with memory of their own: V views of the first R images; None where the
            layer was not called or gave no such tensor.
        """
        views, self._armed, self._views = self._views, False, []
        widths = {view.shape for view in views}
        return torch.stack(views[: self.limit]) if len(widths) == 1 else None

    def refused(self) -> str | None:
        """Return the type or shape of an output of the last step that was none of the images', if there was one."""
        return self._refused

    def _hook(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not self._armed or len(self._views) >= self.limit:
            return
        if not isinstance(output, Tensor) or output.ndim < 2 or self._rows == 0 or len(output) % self._rows:
            self._refused = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
            return
        for view in torch.split(output.detach(), self._rows)[: self.limit - len(self._views)]:
            pooled = pool(view[: self.only_rows], len(view[: self.only_rows]), self.tokens)
            if pooled is not None:
                self._views.append(pooled)


def count_images(batch: Any) -> int:
    """Return the number of images of a batch; of what is not a batch of images, the rows of the first tensor.

    Args:
        batch: Any batch.

    Returns:
        The number, 0 where there is no tensor.
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
