"""Rotary position embeddings (RoPE) of vision transformers, as in DINOv3."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, check_positive, fail, require


def rope_positions(
    dim: int,
    heads: int,
    height: int,
    width: int,
    *,
    base: float = 100.0,
    normalize_coords: str = "separate",
    device: torch.device | None = None,
) -> Tensor:
    """Return the sines and cosines of DINOv3's rotary position embedding.

    Implements ``RopePositionEmbedding`` of https://github.com/facebookresearch/dinov3 without its augmentations: the
    centers of the patches lie in (-1, 1) along each axis, and are multiplied by 2 pi over periods from 1 to ``base``.

    Args:
        dim: Width of the tokens, a multiple of 4 times ``heads``.
        heads: Number of heads, >= 1.
        height: Rows of patches, >= 1.
        width: Columns of patches, >= 1.
        base: The largest period is just below it, > 0.
        normalize_coords: What the coordinates are divided by: "separate" is the length of each axis, "max" and "min"
            are the longer and the shorter one.
        device: Where to compute them; None is the default device.

    Returns:
        ``(2, height * width, dim / heads)``: sines, then cosines, row by row; of a head, first the frequencies of the
        row, then those of the column, all of them twice.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> rope_positions(16, 2, height=2, width=3).shape
        torch.Size([2, 6, 8])
    """
    check_at_least("heads", heads, 1)
    check_at_least("height", height, 1)
    check_at_least("width", width, 1)
    check_positive("base", base)
    check_choice("normalize_coords", normalize_coords, ("separate", "max", "min"))
    require(dim > 0 and dim % (4 * heads) == 0, "dim", f"be a multiple of {4 * heads}, 4 x heads", dim, "Change one")
    quarter = dim // heads // 4
    lengths = {"separate": (height, width), "max": (max(height, width),) * 2, "min": (min(height, width),) * 2}
    down, across = (
        2 * (torch.arange(count, dtype=torch.float32, device=device) + 0.5) / length - 1
        for count, length in zip((height, width), lengths[normalize_coords], strict=True)
    )
    places = torch.cartesian_prod(down, across)  # (P, 2)
    periods = base ** (torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).tile(2)  # (P, dim / heads)
    return torch.stack([angles.sin(), angles.cos()])


class Rope(nn.Module):
    """Rotate the queries or keys of patches by their positions; those of class and register tokens stay.

    The patches form a square grid of any size, as all views of a `MaskedViT` do.

    Args:
        prefix: Number of class and register tokens, which come first, >= 0.
        base: See `rope_positions`.
    """

    def __init__(self, prefix: int, base: float = 100.0) -> None:
        super().__init__()
        check_at_least("prefix", prefix, 0)
        check_positive("base", base)
        self.prefix, self.base = prefix, base

    def forward(self, x: Tensor) -> Tensor:
        """Return the queries or keys ``(B, heads, N, d)``, of the same dtype.

        Raises:
            ValueError: If the patches do not form a square.
        """
        patches, width = x.shape[2] - self.prefix, x.shape[3]
        edge = math.isqrt(patches)
        hint = "RoPE needs square views of which no patches are dropped"
        require(edge * edge == patches, "patches", "form a square grid", patches, hint)
        sine, cosine = rope_positions(width, 1, edge, edge, base=self.base, device=x.device)  # (P, d) each
        first, second = x[:, :, self.prefix :].chunk(2, dim=-1)
        turned = x[:, :, self.prefix :] * cosine + torch.cat([-second, first], dim=-1) * sine
        return torch.cat([x[:, :, : self.prefix], turned.to(x.dtype)], dim=2)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"prefix={self.prefix}, base={self.base}"


def use_rope(vit: nn.Module, *, base: float = 100.0) -> nn.Module:
    """Replace the learned positions of a timm `VisionTransformer` by rotary ones, in place.

    Its position embedding is set to 0 and frozen; queries and keys of all blocks pass through a `Rope`, in the place of
    their optional norm.

    Args:
        vit: The network, for images ``(B, C, H, W)``, before it is trained or loaded.
        base: See `rope_positions`.

    Returns:
        The network.

    Raises:
        TypeError: If its queries and keys are normalized.
        ValueError: If the width of a head is no multiple of 4.
    """
    network: Any = vit
    for block in network.blocks:
        if not isinstance(block.attn.q_norm, nn.Identity):
            fail("vit", "have no `qk_norm`", type(block.attn.q_norm).__name__, "Leave that argument out", TypeError)
        width = block.attn.head_dim
        require(width % 4 == 0, "vit", "have heads of a width that is a multiple of 4", width, "Change `num_heads`")
        block.attn.q_norm, block.attn.k_norm = (Rope(network.num_prefix_tokens, base) for _ in range(2))
    nn.init.zeros_(network.pos_embed)
    network.pos_embed.requires_grad_(False)
    return vit
