"""Words and character n-grams as tokens, and a text tower that averages their vectors: small sets of captions."""

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_captions, check_probability, require


class NGramTokenizer:
    """Turn texts into hashed words and character n-grams, as fastText does.

    The tokens of a word are the word itself and its n-grams with ``<`` before and ``>`` after it
    (https://arxiv.org/abs/1607.04606, section 3.2). Captions that share words or parts of words share tokens, whatever
    their order: the tokenizer knows no grammar. There is no vocabulary file: a token is the CRC-32 of its UTF-8 bytes
    modulo ``vocab_size - 1``, plus 1; 0 is padding.

    Args:
        vocab_size: Number of token ids, >= 2; several n-grams share an id if it is small.
        sizes: Numbers of characters of the n-grams, each >= 1.

    Raises:
        TypeError: If a number is not whole.
        ValueError: If a number is too small.

    Example:
        >>> NGramTokenizer(100, sizes=(3,))(["cat", "a cat"]).shape
        torch.Size([2, 6])
    """

    def __init__(self, vocab_size: int = 20_000, sizes: tuple[int, ...] = (3, 4, 5)) -> None:
        check_at_least("vocab_size", vocab_size, 2)
        for size in sizes:
            check_at_least("sizes", size, 1)
        self.vocab_size, self.sizes = vocab_size, tuple(sizes)

    def __call__(self, texts: list[str]) -> Tensor:
        """Return int64 tokens (B, L) of B texts; L is that of the text with most tokens.

        Raises:
            TypeError: If ``texts`` is not a list of str.
            ValueError: If a text is empty.
        """
        rows = [torch.tensor(self._tokens(text)) for text in check_captions(texts)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _tokens(self, text: str) -> list[int]:
        parts = []
        for word in text.lower().split():
            edged = f"<{word}>"
            parts.append(f"word {word}")  # not an n-gram: those have no spaces
            parts += [edged[i : i + size] for size in self.sizes for i in range(len(edged) - size + 1)]
        return [1 + zlib.crc32(part.encode()) % (self.vocab_size - 1) for part in parts]


class NGramTower(nn.Module):
    """Text tower without order: the sum of the tokens' vectors, divided by the root of their number, and an MLP.

    Our own, for sets of about a thousand captions, which are too few for a transformer to learn words from bytes. It
    is LayerNorm(x) + MLP(LayerNorm(x)) of that sum x.

    Args:
        vocab_size: Number of token ids, that of the `NGramTokenizer`, >= 2.
        width: T, the width of the vectors and of the output, >= 1.
        dropout: Share of the tokens of a text that are left out in training, and of the MLP's hidden units, in [0, 1).

    Attributes:
        num_features: T.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a number is out of range.

    Example:
        >>> tokenizer = NGramTokenizer()
        >>> NGramTower(tokenizer.vocab_size, 16)(tokenizer(["cat", "a cat"])).shape
        torch.Size([2, 16])
    """

    def __init__(self, vocab_size: int = 20_000, width: int = 128, dropout: float = 0.2) -> None:
        super().__init__()
        check_at_least("vocab_size", vocab_size, 2)
        check_at_least("width", width, 1)
        check_probability("dropout", dropout)
        require(dropout < 1, "dropout", "be < 1", dropout, "Leave some tokens")
        self.num_features, self.dropout = width, dropout
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.norm = nn.LayerNorm(width)
        hidden = nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        self.mlp = nn.Sequential(*hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return one vector per text, (B, T), of int64 tokens (B, L); tokens 0 do not count."""
        present = (tokens > 0).to(self.embedding.weight.dtype)  # (B, L)
        if self.training and self.dropout:
            present = present * (F.dropout(torch.ones_like(present), self.dropout) > 0)
        total = (self.embedding(tokens) * present.unsqueeze(2)).sum(1)  # (B, T)
        mean: Tensor = self.norm(total / present.sum(1, keepdim=True).clamp(min=1).sqrt())
        return mean + self.mlp(mean)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
