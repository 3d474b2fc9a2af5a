"""CLIP's text tower: a causal transformer over tokens that ends each text with the largest token id."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, require

_INIT_STD = 0.02
_POSITION_STD = 0.01


class TextTransformer(nn.Module):
    """Causal pre-norm transformer whose output for a text is that of its end token.

    Architecture and initialization are those of CLIP's text tower (https://arxiv.org/abs/2103.00020, section 2.4;
    reference implementation: OpenCLIP): learned positions, MLP ratio 4, exact GELU, LayerNorm with epsilon 1e-5, the
    last LayerNorm at the end token. The end token is the one with the largest id in its row, as in CLIP's tokenizer and
    `ByteTokenizer`. Padding comes after it, so that causality alone keeps it out of the output.

    Args:
        vocab_size: Number of token ids, >= 2.
        context_length: L, the largest number of tokens of a text, >= 2.
        width: Width of the token states, a multiple of ``heads``.
        layers: Number of blocks, >= 1.
        heads: Attention heads of each block, >= 1; CLIP has one for every 64 channels.
        embedding_dim: D, the width of a linear projection without bias after the last norm; None: no projection, and D
            is ``width``.

    Attributes:
        num_features: D, the width of the output.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a size is too small, or ``width`` is not a multiple of ``heads``.

    Example:
        >>> tower = TextTransformer(259, 16, 32, 1, 2)
        >>> tower(torch.tensor([[257, 104, 105, 258], [257, 104, 258, 0]])).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        *,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_at_least("vocab_size", vocab_size, 2)
        check_at_least("context_length", context_length, 2)
        check_at_least("width", width, 1)
        check_at_least("layers", layers, 1)
        check_at_least("heads", heads, 1)
        require(width % heads == 0, "width", f"be a multiple of heads={heads}", width, "CLIP has 64 channels per head")
        if embedding_dim is not None:
            check_at_least("embedding_dim", embedding_dim, 1)
        self.vocab_size, self.context_length, self.width = vocab_size, context_length, width
        self.num_features = width if embedding_dim is None else embedding_dim
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(_Block(width, heads, layers) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.projection: nn.Module = nn.Identity()
        if embedding_dim is not None:
            self.projection = nn.Linear(width, embedding_dim, bias=False)
            nn.init.normal_(self.projection.weight, std=width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=_INIT_STD)
        nn.init.normal_(self.positions, std=_POSITION_STD)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that OpenCLIP does not decay, in addition to norms and biases."""
        return {"positions"}

    def forward(self, tokens: Tensor) -> Tensor:
        """Return one vector per text, (B, D), of int64 tokens (B, L)."""
        states = self._encode(tokens)  # (B, L, width)
        end = tokens.argmax(1)  # (B,)
        return self.projection(states[torch.arange(tokens.shape[0], device=tokens.device), end])  # type: ignore[no-any-return]

    def forward_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected states of all tokens (B, L, D), and the lengths (B,): tokens up to and with the end."""
        return self.projection(self._encode(tokens)), tokens.argmax(1) + 1

    def _encode(self, tokens: Tensor) -> Tensor:
        """Return the states (B, L, width) of tokens (B, L) after the last norm."""
        shape = tuple(tokens.shape)
        hint = "Give one row of token ids per text"
        fits = tokens.ndim == 2 and 1 <= tokens.shape[1] <= self.context_length
        require(fits, "tokens", f"have the shape (B, L) with L <= {self.context_length}", shape, hint)
        states = self.token_embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            states = block(states)
        return self.norm(states)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class _Block(nn.Module):
    """Pre-norm block of causal self-attention and an MLP, states (B, L, width)."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        residual = width**-0.5 * (2 * layers) ** -0.5
        stds = {self.qkv: width**-0.5, self.out: residual, self.mlp[0]: (2 * width) ** -0.5, self.mlp[2]: residual}
        for layer, std in stds.items():
            nn.init.normal_(layer.weight, std=std)  # type: ignore[arg-type]  # a tensor
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return the states (B, L, width) after the block."""
        batch, length, width = states.shape
        qkv = self.qkv(self.norm_attention(states)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, heads, L, width / heads) each
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return states + self.mlp(self.norm_mlp(states))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
