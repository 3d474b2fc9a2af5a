"""UTF-8 bytes as tokens: a tokenizer without a vocabulary file."""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_captions

START, END = 257, 258

Tokenizer: TypeAlias = Callable[[list[str]], Any]
"""A function of a list of B str that returns int64 tokens (B, L). Any: LightningCLI would take a class named for a
function that returns a Tensor as that function, and build no instance of it."""


class CutTexts:
    """Count the texts that a tokenizer cut, and warn of the first ones.

    Attributes:
        cut: Number of texts that were cut so far.
    """

    cut: int = 0

    def count_cut(self, cut: int, total: int, context_length: int) -> None:
        """Add texts that were cut, and warn if they are the first.

        Args:
            cut: Number of texts that were cut.
            total: Number of texts of the call.
            context_length: Largest number of tokens of a text.
        """
        if cut and not self.cut:
            warnings.warn(
                f"{cut} of {total} texts are longer than {context_length} tokens and were cut; raise "
                "`context_length`. Further texts are cut without a warning and counted in `tokenizer.cut`.",
                stacklevel=3,
            )
        self.cut += cut


class ByteTokenizer(CutTexts):
    """Turn texts into their UTF-8 bytes between a start and an end token.

    Byte b is token b + 1; 0 is padding, 257 the start and 258, the largest id, the end. A text that is too long is cut
    and keeps its end token; the first call that cuts texts warns with their number, and ``cut`` counts them all.

    Args:
        context_length: Largest number L of tokens, with start and end, >= 3.
        lower: Lower-case the texts, as CLIP's tokenizer does.

    Attributes:
        vocab_size: Number of token ids, 259.
        cut: Number of texts that were cut so far.

    Raises:
        TypeError: If ``context_length`` is not a whole number.
        ValueError: If it is below 3.

    Example:
        >>> ByteTokenizer(8)(["Hi", "you"])
        tensor([[257, 105, 106, 258,   0],
                [257, 122, 112, 118, 258]])
    """

    vocab_size = 259

    def __init__(self, context_length: int = 77, lower: bool = True) -> None:
        check_at_least("context_length", context_length, 3)
        self.context_length, self.lower = context_length, lower

    def __call__(self, texts: list[str]) -> Tensor:
        """Return int64 tokens (B, L) of B texts; L is that of the longest text, at most ``context_length``.

        Raises:
            TypeError: If ``texts`` is not a list of str.
            ValueError: If a text is empty.
        """
        rows = [(text.lower() if self.lower else text).strip().encode() for text in check_captions(texts)]
        room = self.context_length - 2
        self.count_cut(sum(len(row) > room for row in rows), len(rows), self.context_length)
        rows = [row[:room] for row in rows]
        tokens = torch.zeros(len(rows), max(map(len, rows)) + 2, dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row) + 2] = torch.tensor([START, *(byte + 1 for byte in row), END])
        return tokens
