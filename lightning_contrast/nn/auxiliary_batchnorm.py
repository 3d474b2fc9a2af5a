"""A second set of BatchNorm for adversarial images, and marks on tensors that say which rows are adversarial."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from lightning_contrast._checks import fail, require
from lightning_contrast.nn.activation_checkpointing import CheckpointedForward

NAME = "auxiliary_norm"
"""Name of the second set, a submodule of each BatchNorm."""

Parts = tuple[tuple[int, bool], ...]
"""Numbers of consecutive rows, and whether they are adversarial."""

_JOINS = {torch.cat, torch.concat, torch.concatenate}
_SLICES = {torch.split, torch.Tensor.split, torch.chunk, torch.Tensor.chunk, torch.tensor_split}
_KEEPS = {
    *(torch.flatten, torch.Tensor.flatten, torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.relu),
    *(torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.double, torch.Tensor.to),
    *(torch.Tensor.contiguous, torch.Tensor.clone, torch.clone, F.normalize, F.relu, F.dropout),
    torch.Tensor.view_as,  # what FSDP2 does with the inputs of a network
}
_IMAGE_DIMS = 4


class MarkedRows(Tensor):
    """Images, or features of them, with the mark of each row: a tensor that knows which of its rows are adversarial.

    Concatenations, slices and casts of rows keep the marks; so does every operation on images ``(B, C, h, w)`` that are
    all alike, such as a permutation. Results of other operations are plain tensors.

    Args:
        rows: ``(B, ...)``.
        parts: Numbers of consecutive rows, B in all, and whether they are adversarial.
    """

    parts: Parts

    @staticmethod
    def __new__(cls, rows: Tensor, parts: Parts) -> "MarkedRows":
        """Return the rows as a tensor with marks, of the same memory."""
        marked: Any = rows.as_subclass(cls)
        marked.parts = parts
        return marked  # type: ignore[no-any-return]

    @property
    def plain(self) -> Tensor:
        """The rows without marks, ``(B, ...)``."""
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation on plain tensors and mark its result where the marks are known."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if func in _SLICES and isinstance(args[0], MarkedRows) and _dim(func, args, kwargs) == 0:
                first, marked = 0, []
                for one in result:
                    marked.append(MarkedRows(one, _slice(args[0].parts, first, first + len(one))))
                    first += len(one)
                return type(result)(marked)
            parts = _parts_of(func, args, kwargs, result) if isinstance(result, Tensor) and result.ndim else None
            return result if parts is None else MarkedRows(result, parts)


def _parts_of(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> Parts | None:
    """Return the parts of the rows of a result ``(N, ...)``, None if they are not known."""
    first = args[0] if args else None
    if func in _JOINS:
        joins = _dim(func, args, kwargs) == 0 and all(isinstance(one, MarkedRows) for one in first or ())
        return _merge(tuple(part for one in first or () for part in one.parts)) if joins else None
    if not isinstance(first, MarkedRows) or func is torch.Tensor.as_subclass:
        return None
    if func is torch.Tensor.__getitem__ and isinstance(args[1], slice) and args[1].step in (None, 1):
        start, stop, _ = args[1].indices(len(first))
        return _slice(first.parts, start, stop)
    if func in _KEEPS and len(result) == len(first):
        return first.parts
    alike = len(first.parts) == 1 and first.ndim == result.ndim == _IMAGE_DIMS
    return ((len(result), first.parts[0][1]),) if alike else None


def _dim(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the dimension of a concatenation or a split."""
    place = 1 if func in _JOINS else 2
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    return int(dim)


def _merge(parts: Parts) -> Parts:
    """Join neighbors of one kind."""
    merged: list[tuple[int, bool]] = []
    for rows, kind in parts:
        if merged and merged[-1][1] == kind:
            merged[-1] = (merged[-1][0] + rows, kind)
        elif rows:
            merged.append((rows, kind))
    return tuple(merged) or parts[:1]


def _slice(parts: Parts, start: int, stop: int) -> Parts:
    """Return the parts of the rows from ``start`` to ``stop``."""
    found, first = [], 0
    for rows, kind in parts:
        found.append((max(0, min(stop, first + rows) - max(start, first)), kind))
        first += rows
    return _merge(tuple(found))


def add_auxiliary_batchnorm(module: nn.Module) -> int:
    """Give every BatchNorm of a network a second set of statistics and affine parameters, a copy of the first.

    The auxiliary BatchNorm of AdvProp (https://arxiv.org/abs/1911.09665). The keys of the first set stay; those of the
    second are ``auxiliary_norm.*`` below them. The network computes as before until `route` is used. BatchNorm that
    has a second set keeps it. ``SyncBatchNorm.convert_sync_batchnorm`` converts both.

    Args:
        module: The network, changed in place.

    Returns:
        The number of BatchNorm layers with a second set.
    """
    norms = _norms(module)
    for norm in norms:
        if not hasattr(norm, NAME):
            norm.add_module(NAME, copy.deepcopy(norm))
    return len(norms)


def without_auxiliary(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the second sets of BatchNorm.

    Args:
        state: Tensors by name.
    """
    return {name: value for name, value in state.items() if NAME not in name.split(".")}


class Route:
    """Which set the BatchNorm layers of a network use.

    Attributes:
        parts: Parts of the rows of a pass in training; None outside of one.
        auxiliary: Whether a pass in eval mode uses the second set.
    """

    def __init__(self, name: str) -> None:
        self.name, self.auxiliary = name, False
        self.parts: Parts | None = None

    @contextmanager
    def rows(self, parts: Parts) -> Iterator[None]:
        """Use these parts in the block."""
        before, self.parts = self.parts, parts
        try:
            yield
        finally:
            self.parts = before


class RoutedNorm:
    """Replacement of the ``forward`` of a BatchNorm with two sets.

    Args:
        norm: The BatchNorm, with its second set.
        route: That of its network.
    """

    def __init__(self, norm: nn.Module, route: Route) -> None:
        self.norm, self.route = norm, route

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalize rows ``(B, C, ...)``, each by the set of its kind."""
        own, other = type(self.norm).forward.__get__(self.norm), getattr(self.norm, NAME)
        if not self.norm.training:
            return other(rows) if self.route.auxiliary else own(rows)  # type: ignore[no-any-return]
        parts = self.route.parts
        if parts is None:
            hint = "Call the network itself with views, or rows of its features; do not recompute activations"
            fail("rows", f"be known to be adversarial or not in {self.route.name!r}", "unmarked rows", hint)
        if rows.shape[0] != sum(size for size, _ in parts):
            hint = "Auxiliary BatchNorm needs one row per image"
            fail("rows", f"be those of {sum(size for size, _ in parts)} images", rows.shape[0], hint)
        if len(parts) == 1:
            used, unused = (other, self.norm) if parts[0][1] else (own, other)
            return _with_zero_gradient(used(rows), unused)
        pieces = torch.split(rows, [size for size, _ in parts])
        outputs = {}
        for kind, norm in ((False, own), (True, other)):
            of_kind = [piece for piece, (_, its) in zip(pieces, parts, strict=True) if its == kind]
            sizes = [len(piece) for piece in of_kind]
            outputs[kind] = iter(torch.split(norm(torch.cat(of_kind)), sizes))
        return torch.cat([next(outputs[kind]) for _, kind in parts])


def _with_zero_gradient(output: Tensor, unused: nn.Module) -> Tensor:
    """Return the output ``(B, ...)`` with a gradient of 0 for the affine parameters of the set that it did not use."""
    trained = [p for p in unused.parameters(recurse=False) if p.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return output
    return output + (0 * torch.stack([p.sum() for p in trained]).sum()).to(output.dtype)


class RoutedForward:
    """Replacement of the ``forward`` of a network: reads the marks of its input, and marks its output.

    Args:
        module: The network.
        route: That of its BatchNorm layers.
        inner: A previous ``forward`` of the instance; None if it is that of the class.
    """

    def __init__(self, module: nn.Module, route: Route, inner: Callable[..., Any] | None = None) -> None:
        self.module, self.route, self.inner = module, route, inner

    def __call__(self, rows: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the network."""
        forward = self.inner or type(self.module).forward.__get__(self.module)
        if not isinstance(rows, MarkedRows):
            return forward(rows, *args, **kwargs)
        parts, count = rows.parts, len(rows)
        with self.route.rows(parts):
            output = forward(rows.plain, *args, **kwargs)
        mark = lambda x: MarkedRows(x, parts) if isinstance(x, Tensor) and x.ndim and len(x) == count else x  # noqa: E731
        return tree_map(mark, output)


def route(module: nn.Module) -> dict[str, Route]:
    """Let the networks of a module use the second set of BatchNorm for rows that are marked as adversarial.

    A network is a child of the module. In training every BatchNorm must be reached through a call of its network with
    `MarkedRows`.

    Args:
        module: A module with networks after `add_auxiliary_batchnorm`.

    Returns:
        The route of each network with BatchNorm, by its name.

    Raises:
        ValueError: If a BatchNorm has one set.
    """
    routes = {}
    for name, network in module.named_children():
        norms = _norms(network)
        if not norms:
            continue
        routes[name] = Route(name)
        for norm in norms:
            if not hasattr(norm, NAME):
                fail("batchnorm", "have two sets", name, "Create the network before `configure_model`")
            norm.__dict__["forward"] = RoutedNorm(norm, routes[name])
        hint = "Put it into an `nn.Sequential`"
        require(not isinstance(network, _BatchNorm), "batchnorm", "be part of a network", name, hint)
        recomputed = any(isinstance(m.__dict__.get("forward"), CheckpointedForward) for m in network.modules())
        hint = "Use `GradientCache`, or leave one of both out"
        require(not recomputed, "batchnorm", "not be recomputed by `checkpoint_activations`", name, hint)
        outer, owner = _owner_of(network)
        owner[outer] = RoutedForward(network, routes[name], owner.get(outer))
    return routes


def unroute(module: nn.Module) -> None:
    """Undo `route`.

    Args:
        module: The module that was given to it.
    """
    for network in module.children():
        for norm in _norms(network):
            if isinstance(norm.__dict__.get("forward"), RoutedNorm):
                del norm.__dict__["forward"]
        outer, owner = _owner_of(network)
        routed = owner.get(outer)
        if isinstance(routed, RoutedForward):
            owner[outer] = routed.inner
            if outer == "forward" and routed.inner is None:
                del owner[outer]


def remove_auxiliary_batchnorm(network: nn.Module) -> None:
    """Remove the second sets of BatchNorm of a network, in place, and their routes."""
    unroute(nn.ModuleList([network]))
    for norm in list(network.modules()):
        if hasattr(norm, NAME):
            delattr(norm, NAME)


def _owner_of(network: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return where the ``forward`` of a network is: inside that of `GradientCache`, which recomputes it, if any."""
    forward = network.__dict__.get("forward")
    return ("inner", vars(forward)) if hasattr(forward, "chunk_size") else ("forward", network.__dict__)


def _norms(module: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers of a network, without second sets."""
    named = module.named_modules()
    return [norm for name, norm in named if isinstance(norm, _BatchNorm) and NAME not in name.split(".")]
