"""Vision transformers of clips, which cut a clip into tubelets, and V-JEPA's predictor of tubelets."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, check_dict, check_probability, fail, require
from lightning_contrast.nn.backbones import BUILT_AS, Backbone
from lightning_contrast.nn.jepa_predictor import JepaPredictor
from lightning_contrast.nn.positions import sincos_positions_3d

_PUBLISHED = {"frames": 16, "img_size": 224, "patch_size": 16}
VIDEO_VITS: dict[str, dict[str, int]] = {
    "small_video_vit": {"frames": 8, "img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
    "video_vit_base": _PUBLISHED | {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "video_vit_large": _PUBLISHED | {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "video_vit_huge": _PUBLISHED | {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
"""Sizes of `TubeletViT` by name: one for demonstrations and tests on a CPU, and those of V-JEPA."""


class TubeletViT(nn.Module):
    """A vision transformer of clips, without class token: tubelets, fixed positions, blocks (timm's) and a norm.

    Implements the encoder of V-JEPA (https://arxiv.org/abs/2404.08471): a 3-D convolution cuts the clip into tubelets
    that do not overlap, and sine-cosine positions of time, row and column are added. Linear weights start from a
    truncated normal of 0.02; the reference implementation overwrites its scaling by depth as well.

    Args:
        frames: T, frames of a clip, a multiple of ``tubelet``.
        img_size: Edge of the frames in pixels, a multiple of ``patch_size``.
        patch_size: Edge of a tubelet in pixels, >= 1.
        tubelet: Frames of a tubelet, >= 1; 2 in the paper.
        embed_dim: F, the width of tokens and features, a multiple of ``num_heads``, even.
        depth: Number of blocks, >= 1.
        num_heads: Number of attention heads, >= 1.
        in_chans: Channels of the frames.
        drop_path_rate: Stochastic depth of the last block, from 0 in the first; 0 in the paper.

    Attributes:
        num_features: F.
        grid: Tubelets over time, rows and columns.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a size is out of range or does not fit another one.

    Example:
        >>> network = TubeletViT(frames=4, img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2)
        >>> network(torch.zeros(2, 4, 3, 16, 16)).shape, network.grid
        (torch.Size([2, 12]), (2, 2, 2))
    """

    positions: Tensor

    def __init__(
        self,
        *,
        frames: int,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        tubelet: int = 2,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        given = {"frames": frames, "img_size": img_size, "patch_size": patch_size, "tubelet": tubelet}
        given |= {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "in_chans": in_chans}
        for name, value in given.items():
            check_at_least(name, value, 1)
        check_probability("drop_path_rate", drop_path_rate)
        hint = "Change one of them"
        require(frames % tubelet == 0, "frames", f"be a multiple of the {tubelet} frames of a tubelet", frames, hint)
        fits = img_size % patch_size == 0
        require(fits, "img_size", f"be a multiple of `patch_size`, {patch_size}", img_size, hint)
        fits = embed_dim % num_heads == 0 and embed_dim % 2 == 0
        require(fits, "embed_dim", f"be even and a multiple of the {num_heads} heads", embed_dim, hint)
        self.frames, self.size, self.channels, self.num_features = frames, img_size, in_chans, embed_dim
        self.grid = (frames // tubelet, img_size // patch_size, img_size // patch_size)
        self.heads, self.grad_checkpointing = num_heads, False
        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # timm's annotation asks for a class, but any callable works
        edges = (tubelet, patch_size, patch_size)
        self.embed = nn.Conv3d(in_chans, embed_dim, edges, stride=edges)
        drops = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        options: dict[str, Any] = {"qkv_bias": True, "norm_layer": norm}
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, drop_path=drop, **options) for drop in drops))
        self.norm = norm(embed_dim)
        positions = sincos_positions_3d(embed_dim, self.grid[1:], self.grid[0], uniform_power=True)
        self.register_buffer("positions", positions, persistent=False)
        self.apply(_initialize)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory."""
        self.grad_checkpointing = enable

    def forward(self, clips: Tensor) -> Tensor:
        """Return the features (B, F), the mean of the tokens, of clips (B, T, C, H, W) or images (B, C, H, W)."""
        return self.tokens(clips).mean(1)

    def tokens(self, clips: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """Return the tokens of clips.

        Args:
            clips: Clips ``(B, T, C, H, W)``; an image ``(B, C, H, W)`` is a clip that stands still.
            keep: The only tubelets that enter the blocks, ``(B, K)`` int64, each in 0 .. N - 1, counted time by time
                and row by row.

        Returns:
            ``(B, N, F)``, or ``(B, K, F)`` in the order of ``keep``, after the last norm.

        Raises:
            ValueError: If the clips have another shape.
        """
        from timm.models import checkpoint_seq

        if clips.ndim == 4:
            clips = clips.unsqueeze(1).expand(-1, self.frames, -1, -1, -1)
        expected = (self.frames, self.channels, self.size, self.size)
        hint = "Make such views, or build the network for these clips with `backbone_kwargs`"
        fits = clips.ndim == 5 and tuple(clips.shape[1:]) == expected
        require(fits, "clips", f"be (B, {', '.join(map(str, expected))}) for this network", tuple(clips.shape), hint)
        tokens = self.embed(clips.transpose(1, 2)).flatten(2).mT  # (B, N, F)
        tokens = tokens + self.positions.to(tokens.dtype)
        if keep is not None:
            tokens = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        tokens = checkpoint_seq(self.blocks, tokens) if recompute else self.blocks(tokens)
        return self.norm(tokens)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


def build_tubelet_backbone(
    backbone: str | nn.Module,
    *,
    small_images: bool = False,
    feature_dim: int | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    tokens: str | None = None,
) -> Backbone:
    """Return a `TubeletViT` and the width of its features.

    Args:
        backbone: A key of `VIDEO_VITS`, or a `TubeletViT`, which is used as it is.
        small_images: Must be False: choose the patch with ``backbone_kwargs=dict(img_size=32, patch_size=4)``.
        feature_dim: The width of the network, or None.
        backbone_kwargs: Arguments of `TubeletViT` that replace those of the name.
        tokens: Must be None.

    Raises:
        ValueError: If the name is unknown, or an option does not fit.
        TypeError: If the module is no `TubeletViT`.
    """
    hint = "Remove it, or choose sizes with `backbone_kwargs`"
    require(not small_images, "small_images", "be False for a transformer of clips", small_images, hint)
    require(tokens is None, "tokens", "be None for a transformer of clips", tokens, hint)
    if isinstance(backbone, str):
        check_choice("backbone", backbone, tuple(VIDEO_VITS))
        given = check_dict("backbone_kwargs", backbone_kwargs)
        settings: dict[str, Any] = VIDEO_VITS[backbone] | given
        module = TubeletViT(**settings)
        built = {
            "name": backbone,
            "small_images": False,
            "backbone_kwargs": given,
            "tokens": None,
        }
        object.__setattr__(module, BUILT_AS, built)
    elif isinstance(backbone, TubeletViT):
        hint = "Give these arguments where you build the module"
        require(not backbone_kwargs, "backbone_kwargs", "be None where `backbone` is a module", backbone_kwargs, hint)
        module = backbone
    else:
        hint = f"Choose one of {', '.join(map(repr, VIDEO_VITS))}, or pass a `nn.TubeletViT`"
        fail("backbone", "be a transformer that can drop tubelets", type(backbone).__name__, hint, TypeError)
    same = feature_dim in (None, module.num_features)
    require(same, "feature_dim", f"be None or {module.num_features}", feature_dim, "Remove it")
    return Backbone(module, module.num_features)


class TubeletPredictor(JepaPredictor):
    """Predict the features of hidden tubelets from those of the visible ones, for several kinds of masks.

    Implements the predictor of V-JEPA (https://arxiv.org/abs/2404.08471): that of I-JEPA, with positions in time and a
    mask token for each kind of mask, which starts at zero.

    Args:
        feature_dim: F, the width of the encoder's tokens.
        grid: Tubelets over time, rows and columns.
        kinds: Number of kinds of masks, >= 1.
        width: Width of the predictor, a multiple of 4 and of ``heads``; 384 in the paper.
        depth: Number of blocks, >= 1; 12 in the paper.
        heads: Number of attention heads, >= 1.

    Raises:
        ValueError: If a number is out of its range or the width is no multiple of ``heads``.
    """

    def __init__(
        self,
        feature_dim: int,
        grid: tuple[int, int, int],
        kinds: int,
        *,
        width: int = 384,
        depth: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__(feature_dim, grid[1:], width=width, depth=depth, heads=heads)
        check_at_least("kinds", kinds, 1)
        positions = sincos_positions_3d(width, grid[1:], grid[0], uniform_power=True)
        self.register_buffer("positions", positions, persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(kinds, width))

    def forward(self, tokens: Tensor, context: Tensor, targets: Tensor, kind: int = 0) -> Tensor:
        """Return the predicted features of hidden tubelets.

        Args:
            tokens: The encoder's output for the visible tubelets, ``(B, K, F)``.
            context: Their positions, ``(B, K)`` int64.
            targets: Positions of the hidden tubelets, ``(B, M)`` int64.
            kind: Number of the kind of mask.

        Returns:
            Predictions ``(B, M, F)``.
        """
        return self.predict(tokens, context, targets.unsqueeze(1), self.mask_token[kind]).squeeze(1)


def _initialize(module: nn.Module) -> None:
    """Initialize linear and convolutional layers as in the reference implementation."""
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
