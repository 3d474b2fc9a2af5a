"""Predictor of I-JEPA: a narrow transformer that predicts the features of target patches."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, require
from lightning_contrast.nn.positions import sincos_positions


class JepaPredictor(nn.Module):
    """Predict the features of target blocks from those of the context.

    Implements the predictor of I-JEPA (https://arxiv.org/abs/2301.08243) as in the reference implementation: the
    context is projected to a narrow width, a mask token represents each target patch, fixed positions are added, and
    transformer blocks (timm's), a norm and a projection back follow. Target blocks are predicted independently. Linear
    weights start from a truncated normal of 0.02; the reference overwrites its scaling by depth as well.

    Args:
        feature_dim: F, the width of the context encoder's tokens.
        grid: Rows and columns of patches.
        width: Width of the predictor, a multiple of 4 and of ``heads``; 384 in the paper.
        depth: Number of blocks, >= 1; 12 for ViT-L and larger in the paper, 6 for ViT-B.
        heads: Number of attention heads, >= 1; as many as the encoder has in the paper.

    Raises:
        ValueError: If a number is out of its range or the width is no multiple of ``heads``.
    """

    positions: Tensor

    def __init__(
        self, feature_dim: int, grid: tuple[int, int], *, width: int = 384, depth: int = 12, heads: int = 12
    ) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        check_at_least("depth", depth, 1)
        check_at_least("heads", heads, 1)
        positions = sincos_positions(width, grid)
        rule = f"be a multiple of the {heads} heads"
        require(width % heads == 0, "width", rule, width, "Change one of them")
        self.grid = grid
        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # timm's annotation asks for a class, but any callable works
        self.enter = nn.Linear(feature_dim, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(width)
        self.leave = nn.Linear(width, feature_dim)
        self.register_buffer("positions", positions, persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.apply(_initialize)

    def forward(self, tokens: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Return the predicted features of the target blocks.

        Args:
            tokens: The context encoder's output, ``(B, N_c, F)``.
            context: Positions of its patches in the grid, ``(B, N_c)`` int64.
            targets: Positions of the target patches, ``(B, T, N_t)`` int64.

        Returns:
            Predictions, ``(B, T, N_t, F)``.
        """
        return self.predict(tokens, context, targets, self.mask_token)

    def predict(self, tokens: Tensor, context: Tensor, targets: Tensor, mask_token: Tensor) -> Tensor:
        """Return what `forward` does, with a given mask token.

        Args:
            tokens: The context encoder's output, ``(B, N_c, F)``.
            context: Positions of its patches in the grid, ``(B, N_c)`` int64.
            targets: Positions of the target patches, ``(B, T, N_t)`` int64.
            mask_token: ``(width,)``.
        """
        images, blocks, length = targets.shape
        seen = self.enter(tokens)
        seen = seen + self.positions[context].to(seen.dtype)  # (B, N_c, W)
        hidden = (mask_token + self.positions[targets]).to(seen.dtype)  # (B, T, N_t, W)
        seen = seen.unsqueeze(1).expand(-1, blocks, -1, -1)
        sequence = torch.cat([seen, hidden], dim=2).flatten(0, 1)  # (B T, N_c + N_t, W)
        predicted: Tensor = self.leave(self.norm(self.blocks(sequence))[:, -length:])  # (B T, N_t, F)
        return predicted.view(images, blocks, length, -1)


def check_predictor(dim: int, depth: int, heads: int) -> None:
    """Check the sizes of a predictor under the names of the method's arguments.

    Args:
        dim: ``predictor_dim``, a multiple of 4 and of the heads.
        depth: ``predictor_depth``, >= 1.
        heads: ``predictor_heads``, >= 1.
    """
    for name, value in (("predictor_dim", dim), ("predictor_depth", depth), ("predictor_heads", heads)):
        check_at_least(name, value, 1)
    rule = f"be a multiple of 4 and of its {heads} heads"
    require(dim % 4 == 0 and dim % heads == 0, "predictor_dim", rule, dim, "Change it or `predictor_heads`")


def _initialize(module: nn.Module) -> None:
    """Initialize linear layers as in the reference implementation."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
