"""Decoder of MAE: a small transformer that predicts the pixels of all patches from the visible ones."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, require
from lightning_contrast.nn.positions import sincos_positions


class PixelDecoder(nn.Module):
    """Predict the pixels of patches from the features of the visible patches.

    Implements the decoder of MAE (https://arxiv.org/abs/2111.06377) as in the reference implementation: the visible
    patches are projected to another width, a mask token represents each hidden patch, fixed positions are added to
    both, and transformer blocks (timm's), a norm and a linear layer follow. Linear weights are Xavier uniform.

    Args:
        feature_dim: F, the width of the encoder's tokens.
        grid: Rows and columns of patches, N in all.
        out_dim: Values per patch, ``patch_size^2 * channels``.
        width: Width of the decoder, a multiple of 4 and of ``heads``; 512 in the paper.
        depth: Number of blocks, >= 1; 8 in the paper.
        heads: Number of attention heads, >= 1; 16 in the paper.

    Raises:
        ValueError: If a number is out of its range or the width is no multiple of ``heads``.
    """

    positions: Tensor

    def __init__(
        self,
        feature_dim: int,
        grid: tuple[int, int],
        out_dim: int,
        *,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
    ) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        for name, value in (
            ("decoder_dim", width),
            ("decoder_depth", depth),
            ("decoder_heads", heads),
            ("out_dim", out_dim),
        ):
            check_at_least(name, value, 1)
        rule = f"be a multiple of 4 and of the {heads} heads"
        fits = width % 4 == 0 and width % heads == 0
        require(fits, "decoder_dim", rule, width, "Change one of them")
        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # timm's annotation asks for a class, but any callable works
        self.enter = nn.Linear(feature_dim, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(width)
        self.leave = nn.Linear(width, out_dim)
        self.register_buffer("positions", sincos_positions(width, grid), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(_initialize)

    def forward(self, patches: Tensor, prefix: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Return the predicted pixels of all patches.

        Args:
            patches: The encoder's output for the visible patches, ``(B, K, F)``.
            prefix: Its class and register tokens, ``(B, P, F)``; P may be 0.
            visible: Positions of the visible patches, ``(B, K)`` int64.
            hidden: Positions of all others, ``(B, N - K)`` int64.

        Returns:
            Predictions ``(B, N, out_dim)``, row by row.
        """
        order = torch.cat([visible, hidden], dim=1)  # (B, N)
        seen = self.enter(patches)
        masked = self.mask_token.to(seen.dtype).expand(*hidden.shape, -1)
        tokens = torch.cat([seen, masked], dim=1)
        tokens = tokens + self.positions[order].to(tokens.dtype)  # (B, N, W)
        sequence = torch.cat([self.enter(prefix), tokens], dim=1)
        predicted: Tensor = self.leave(self.norm(self.blocks(sequence))[:, prefix.shape[1] :])
        place = order.argsort(1).unsqueeze(-1).expand(-1, -1, predicted.shape[-1])  # in raster order
        return predicted.gather(1, place)


def _initialize(module: nn.Module) -> None:
    """Initialize linear layers as in the reference implementation."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
