"""Similarity of the layers of one network."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.metrics import cka
from lightning_contrast.metrics.zero_shot import eval_mode

_LEAST = 4  # images of the unbiased estimate


class LayerSimilarity(NamedTuple):
    """CKA between the layers of a network.

    Attributes:
        names: Names of the layers in the order in which they run; the last is "output".
        cka: ``(L, L)``, float64: 1 for equal up to rotation and scale, NaN for a constant layer.
    """

    names: tuple[str, ...]
    cka: Tensor


@torch.no_grad()
def layer_similarity(model: nn.Module, inputs: Tensor, *, most: int = 24) -> LayerSimilarity:
    """Compare the layers of a network by unbiased linear CKA on the same images.

    Layers are the modules with parameters that follow each other in the outermost chain of the network, such as the
    stem and the blocks of a transformer or of a residual network. Activations are flattened, as in
    https://arxiv.org/abs/1905.00414. The network runs in eval mode, on all images at once.

    Args:
        model: Maps ``inputs`` to features ``(N, F)``.
        inputs: ``(N, C, H, W)``, N >= 4.
        most: Layers at most, at equal distances, >= 2.

    Raises:
        ValueError: If there are too few images, or ``most`` is out of range.
        TypeError: If the output of the network is not a tensor.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> layer_similarity(network, torch.rand(6, 3, 2, 2)).names
        ('1', 'output')
    """
    check_at_least("most", most, 2)
    require(len(inputs) >= _LEAST, "inputs", f"hold {_LEAST} images or more", len(inputs), "Use more images")
    with eval_mode(model):
        layers = _chain(model, inputs[:_LEAST])
        products: dict[str, Tensor] = {}
        kept = {id(layer): name for name, layer in layers.items()}

        def record(layer: nn.Module, output: Any) -> None:
            if isinstance(output, Tensor) and len(output) == len(inputs):
                products[kept[id(layer)]] = _rows(output)

        with _watched(list(layers.values()), record):
            output = model(inputs)
    if not isinstance(output, Tensor):
        fail("model", "return features (N, F)", type(output).__name__, "Give a network of one output", TypeError)
    last = _rows(output)
    found = [(name, rows) for name, rows in products.items() if not torch.equal(rows, last)] + [("output", last)]
    places = [round(place * (len(found) - 1) / (most - 1)) for place in range(most)] if len(found) > most else None
    found = found if places is None else [found[place] for place in places]
    matrix = torch.ones(len(found), len(found), dtype=torch.float64)
    for row, (_, first) in enumerate(found):
        for column, (_, second) in enumerate(found[: row + 1]):
            value = float(cka(first, second, unbiased=True))
            matrix[row, column] = matrix[column, row] = value if math.isfinite(value) else math.nan
    return LayerSimilarity(tuple(name for name, _ in found), matrix)


def _rows(activations: Tensor) -> Tensor:
    """Return ``(N, N)`` rows with the same centered inner products as activations ``(N, ...)``."""
    flat = activations.detach().flatten(1).double()
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    rows: Tensor = vectors * values.clamp(min=0).sqrt()
    return rows


def _chain(model: nn.Module, inputs: Tensor) -> dict[str, nn.Module]:
    """Return the layers with parameters that a pass of inputs ``(N, C, H, W)`` runs one after another, by name."""
    ran: dict[int, None] = {}
    trained = [module for module in model.modules() if next(module.parameters(), None) is not None]
    with _watched(trained, lambda module, _: ran.setdefault(id(module))):
        model(inputs)
    owner = model
    while len(inner := _inside(owner, ran)) == 1:
        name, only = next(iter(inner.items()))
        if not _inside(only, ran):
            return {name: only}
        owner = only
    found: dict[str, nn.Module] = {}
    for name, layer in inner.items():
        blocks = _inside(layer, ran) if isinstance(layer, nn.Sequential | nn.ModuleList) else {}
        of_leaves = not any(_inside(block, ran) for block in blocks.values())  # such as a convolution and its BatchNorm
        found |= {name: layer} if of_leaves else {f"{name}.{inner}": block for inner, block in blocks.items()}
    return found


def _inside(owner: nn.Module, ran: dict[int, None]) -> dict[str, nn.Module]:
    """Return the children by name that ran or hold what ran."""
    return {name: child for name, child in owner.named_children() if any(id(of) in ran for of in child.modules())}


@contextmanager
def _watched(layers: list[nn.Module], call: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
    """Call a function with each of the layers and its output when it ran."""

    def hook(layer: nn.Module, _: Any, output: Any) -> None:
        call(layer, output)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
