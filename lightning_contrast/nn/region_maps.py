"""Maps of regions out of a backbone whose forward pass gives features, and words out of the states of tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.nn.byte_tokenizer import START

LAST_MAPS = ("layer4", "stages")
"""Names of submodules whose output is the last map, in ResNets and in `SmallConvNet`."""
_SPACE = ord(" ") + 1  # the token of the byte


class RegionMaps:
    """Forward hook that keeps the map (B, C, H, W) of one layer of a backbone while it records.

    The backbone's own forward pass gives the features, so that callbacks, strategies and exports see it unchanged, also
    if `GradientCache` runs it in chunks.

    Args:
        network: The backbone.
        layer: Name of the submodule whose output is the map; None is the first of ``defaults`` that the network has,
            else the network itself, which must then return a map.
        defaults: Names of submodules; "layer3" is a stage of ResNets.

    Attributes:
        layer: The name, "" for the network itself.
        num_channels: C, read from the last norm or convolution of the layer; None if it has none.

    Raises:
        ValueError: If there is no such submodule.
    """

    def __init__(self, network: nn.Module, layer: str | None = None, defaults: Sequence[str] = ("layer3",)) -> None:
        modules = dict(network.named_modules())
        self.layer = layer if layer is not None else next((name for name in defaults if name in modules), "")
        if self.layer not in modules:
            names = [name for name in modules if name and name.count(".") < 2]
            hint = f"The backbone has {', '.join(names[:12])}"
            fail("region_layer", f"be the name of a submodule of {type(network).__name__}", layer, hint)
        self.num_channels = _last_channels(modules[self.layer])
        self._recording, self._maps = False, list[Any]()
        modules[self.layer].register_forward_hook(self, prepend=True)  # before the pooling of the output

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep an output of the layer; the output itself is unchanged."""
        if self._recording:
            self._maps.append(output)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the maps of the forward passes within a block, until `take`."""
        self._recording, self._maps = True, []
        try:
            yield
        finally:
            self._recording = False

    def take(self) -> Tensor:
        """Return the map (B, C, H, W) of the recorded pass, of all its chunks, and forget it.

        Raises:
            ValueError: If the layer has not run, or its output is no map.
        """
        maps, self._maps = self._maps, []
        hint = 'Set `region_layer` to a layer that returns a map (B, C, H, W), such as "layer3"'
        name = self.layer or "the backbone"
        if not maps:
            fail("region_layer", "run in the backbone's forward pass", name, hint)
        for one in maps:
            if not isinstance(one, Tensor) or one.ndim != 4:
                found = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
                fail("region_layer", f"return a map (B, C, H, W) from {name}", found, hint)
        return torch.cat(maps) if len(maps) > 1 else maps[0]

    def channels(self, given: int | None, feature_dim: int) -> int:
        """Return the number of channels of the maps.

        Args:
            given: As given by the user, >= 1, or None.
            feature_dim: Width of the backbone's features, which are the mean of the map if that is its output.

        Raises:
            ValueError: If it cannot be read from the layer.
        """
        if given is not None:
            check_at_least("region_dim", given, 1)
        found = given or self.num_channels or (None if self.layer else feature_dim)
        if found is None:
            fail("region_dim", "be given", None, f"It is the number of channels of `{self.layer}`")
        return found


def project_cells(projector: nn.Module, cells: Tensor) -> Tensor:
    """Return the projections ``(B, D, S)`` of the cells of a map.

    Args:
        projector: Maps vectors ``(N, C)`` to ``(N, D)``; it sees the cells of all images as one batch.
        cells: ``(B, C, S)``.
    """
    rows: Tensor = projector(cells.mT.flatten(0, 1))  # (B S, D)
    return rows.view(len(cells), -1, rows.shape[1]).mT


def _last_channels(layer: nn.Module) -> int | None:
    """Return the width of the last norm or convolution of a layer, or None."""
    width = None
    for module in layer.modules():
        for name in ("out_channels", "num_features", "num_channels"):
            found = getattr(module, name, None)
            if isinstance(module, nn.Conv2d | nn.modules.batchnorm._BatchNorm | nn.GroupNorm) and isinstance(
                found, int
            ):
                width = found
    return width


def byte_words(tokens: Tensor) -> Tensor:
    """Return the number of the word of each token of `ByteTokenizer`, words being separated by spaces.

    Args:
        tokens: int64 tokens (B, L).

    Returns:
        int64 (B, L): 0 for the first word; -1 for spaces, the start, the end and padding.
    """
    inside = (tokens > 0) & (tokens < START) & (tokens != _SPACE)
    before = torch.cat([torch.zeros_like(inside[:, :1]), inside[:, :-1]], dim=1)
    return ((inside & ~before).cumsum(1) - 1).masked_fill(~inside, -1)


def token_words(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return the number of the word of each token where every token before the end is a word, as GLoRIA has it.

    Args:
        tokens: int64 tokens (B, L).
        lengths: Tokens of each text with the end, (B,).

    Returns:
        int64 (B, L): the place of the token; -1 for the end and padding.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return places.masked_fill(places >= lengths[:, None] - 1, -1)


def word_vectors(states: Tensor, ids: Tensor, most: int, *, mean: bool = False) -> tuple[Tensor, Tensor]:
    """Return the vectors of the words of B texts, and how many words each has.

    Args:
        states: Token states (B, L, D).
        ids: Number of the word of each token, (B, L) int64; -1 for tokens of no word.
        most: T on accelerators, where the largest number of words is not read; on a CPU T is that number.
        mean: As in `join_pieces`.

    Returns:
        Words (B, D, T), zeros beyond a text's words, and their numbers (B,), at least 1.

    Raises:
        ValueError: If a text has no word, on a CPU; elsewhere it has one with a vector of zeros.
    """
    counts = ids.amax(1) + 1
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait for the device
        empty = (counts < 1).nonzero().flatten().tolist()
        hint = "Drop such pairs, or give them a caption; padding, spaces, the start and the end are no words"
        require(not empty, "texts", "hold a word each", f"none at {empty[:5]}", hint)
        most = int(counts.max())
    return join_pieces(states, ids, max(most, 1), mean=mean), counts.clamp_min(1)


def join_pieces(states: Tensor, words: Tensor, count: int, *, mean: bool = False) -> Tensor:
    """Return one vector per word: the sum or the mean of the states of its tokens.

    Args:
        states: Token states (B, L, D).
        words: Number of the word of each token, (B, L) int64; -1 for tokens of no word.
        count: T, the largest number of words.
        mean: Average instead of adding up.

    Returns:
        (B, D, T); zeros where there is no word.
    """
    member = (words[:, :, None] == torch.arange(count, device=words.device)).to(states.dtype)  # (B, L, T)
    vectors = states.transpose(1, 2) @ member
    return vectors / member.sum(1, keepdim=True).clamp_min(1) if mean else vectors
