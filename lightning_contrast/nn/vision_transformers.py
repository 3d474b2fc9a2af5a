"""Vision transformers whose patches can be masked or dropped: lightly's adapter around timm's models."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_dict, fail, require
from lightning_contrast.nn.backbones import Backbone, build_backbone
from lightning_contrast.nn.feature_output import TokenPooling
from lightning_contrast.nn.positions import sincos_positions
from lightning_contrast.nn.rope import Rope
from lightning_contrast.nn.small_vit import SMALL_VIT

_TIMM_MODULES = ["vision_transformer", "deit"]  # whose models are a `VisionTransformer`, but for two families
_WHO_CAN = (
    f'Choose {SMALL_VIT!r}, or one of timm\'s "vit_*", "deit_*" and "deit3_*" models that are a plain '
    '`VisionTransformer`, such as "vit_small_patch16_224", "vit_base_patch16_224" or "vit_small_patch14_reg4_dinov2"; '
    "or pass a timm VisionTransformer"
)


class Tokens(NamedTuple):
    """Output of a vision transformer.

    Attributes:
        features: Pooled features ``(B, F)``.
        patches: Patches ``(B, N, F)``.
        prefix: Class and register tokens ``(B, P, F)``, of which there may be none.
    """

    features: Tensor
    patches: Tensor
    prefix: Tensor


class MaskedViT(nn.Module):
    """A timm vision transformer that can also replace patches by a mask token, or drop patches.

    `forward` is the network's own. Its weights without the mask token are ``module.vit.state_dict()``, which loads
    into a fresh timm model. Source of the masking: lightly's ``MaskedVisionTransformerTIMM``, with the network's own
    initialization (that class replaces it by MAE's).

    Args:
        vit: A timm `VisionTransformer` without classifier; used as it is and not copied.
        mask_token: Train the mask token, which starts at zero. False for methods that only drop patches, where it
            would never receive a gradient.

    Attributes:
        num_features: F, the width of features and patches.

    Raises:
        TypeError: If the network is no timm VisionTransformer, or has parts that masking would change.
    """

    def __init__(self, vit: nn.Module, mask_token: bool = True) -> None:
        super().__init__()
        _check_maskable(vit)
        from lightly.models.modules import MaskedVisionTransformerTIMM

        self.masked = MaskedVisionTransformerTIMM(vit, weight_initialization="skip", pos_embed_initialization="skip")
        self.masked.mask_token.requires_grad_(mask_token)
        self.num_features: int = vit.num_features  # type: ignore[assignment]  # an int of timm's

    @property
    def vit(self) -> Any:
        """The timm network."""
        return self.masked.vit

    @property
    def patch_embed(self) -> nn.Module:
        """The patch embedding, which defines the accepted image size."""
        return self.vit.patch_embed  # type: ignore[no-any-return]  # the adapter is not typed

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``(B, F)`` of images ``(B, C, H, W)``, as the timm network pools them."""
        return self.vit(images)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def tokens(self, images: Tensor, *, mask: Tensor | None = None, keep: Tensor | None = None) -> Tokens:
        """Return pooled features and patches of images, with some patches masked or dropped.

        Args:
            images: Images ``(B, C, H, W)``.
            mask: Patches to replace by the mask token before positions are added, ``(B, N)`` bool, True if masked; N
                counts row by row.
            keep: The only patches that enter the blocks, ``(B, K)`` int, each in 0 .. N - 1.

        Returns:
            The features ``(B, F)``, pooled as in `forward`; the patches ``(B, N, F)``, or ``(B, K, F)`` in the order of
            ``keep``, and class and register tokens ``(B, P, F)``, both after the last norm.

        Raises:
            ValueError: If ``mask`` or ``keep`` do not fit the images.
        """
        self._check(images, mask, keep)
        prefix: int = self.vit.num_prefix_tokens
        if mask is not None:
            mask = F.pad(mask, (prefix, 0))
        if keep is not None:
            first = torch.arange(prefix, device=keep.device).expand(len(keep), -1)
            keep = torch.cat([first, keep + prefix], dim=1)
        tokens = self.masked.encode(images, mask=mask, idx_keep=keep)  # (B, prefix + N or K, F)
        return Tokens(self.vit.forward_head(tokens), tokens[:, prefix:], tokens[:, :prefix])

    def layers(self, images: Tensor, count: int) -> list[Tensor]:
        """Return the patches after each of the last blocks, before the last norm.

        Args:
            images: Images ``(B, C, H, W)``.
            count: Number of blocks.

        Returns:
            ``count`` tensors ``(B, N, F)``, in the order of depth.
        """
        blocks = getattr(self.vit.blocks, "module", self.vit.blocks)  # FSDP1's wrapper has no length
        found: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _module, _inputs, output: found.append(output))
            for block in list(blocks)[-count:]
        ]
        try:
            self.masked.encode(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [tokens[:, self.vit.num_prefix_tokens :] for tokens in found]

    def grid_size(self, images: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patches of images ``(B, C, H, W)``."""
        height, width = self.vit.patch_embed.dynamic_feat_size(images.shape[-2:])
        return int(height), int(width)

    @property
    def own_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the images that the network was built for."""
        rows, columns = self.vit.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def patch_size(self) -> int:
        """Edge of a patch in pixels.

        Raises:
            ValueError: If patches are not square.
        """
        height, width = self.vit.patch_embed.patch_size
        require(height == width, "backbone", "have square patches", (height, width), "Set one `patch_size`")
        return int(height)

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return int(self.vit.patch_embed.proj.in_channels)

    def check_grid(self, images: Tensor) -> None:
        """Refuse images ``(B, C, H, W)`` of another size than the network was built for.

        Raises:
            ValueError: If the grid of patches differs.
        """
        grid, size = self.own_grid, tuple(images.shape[-2:])
        if self.grid_size(images) != grid:
            hint = f"Make such views, or build the backbone with backbone_kwargs=dict(img_size={size[0]})"
            patch = self.vit.patch_embed.patch_size
            fail("images", f"be {grid[0] * patch[0]} x {grid[1] * patch[1]} pixels for its masks", size, hint)

    def fix_positions(self) -> None:
        """Replace the learned positions by fixed sine-cosine ones; those of class and register tokens are zero."""
        positions = sincos_positions(self.num_features, self.own_grid)
        rows = self.vit.pos_embed.shape[1] - len(positions)
        self.vit.pos_embed.requires_grad_(False).copy_(F.pad(positions, (0, 0, rows, 0)))

    @property
    def pools_with_parts(self) -> bool:
        """Whether features are made with parameters that patches do not pass: a norm after the mean, or attention."""
        parts = (self.vit.fc_norm, self.vit.attn_pool)
        return any(True for part in parts if isinstance(part, nn.Module) for _ in part.parameters())

    def check_patches_trained(self) -> None:
        """Refuse a network with parts that a loss of the patches would not train.

        Raises:
            ValueError: If it pools with parameters.
        """
        found = f"{type(self.vit).__name__} with global_pool={self.vit.global_pool!r}"
        hint = 'Build it with global_pool="avg" and fc_norm=False'
        require(not self.pools_with_parts, "backbone", "pool its patches without parameters", found, hint)

    def check_drops_patches(self) -> None:
        """Refuse a network that does not know where patches are if some are dropped.

        Raises:
            ValueError: If its positions are rotary: `Rope` takes the patches for a whole grid.
        """
        rotary = any(isinstance(module, Rope) for module in self.vit.modules())
        hint = "Leave `rope` out, or choose a method that replaces hidden patches by a token"
        require(not rotary, "backbone", "have no rotary positions where patches are dropped", "Rope", hint)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory, also with masks."""
        self.masked.set_grad_checkpointing(enable)
        self.vit.set_grad_checkpointing(enable)

    def _check(self, images: Tensor, mask: Tensor | None, keep: Tensor | None) -> None:
        rows, columns = self.grid_size(images)
        if self.vit.dynamic_img_size:  # the adapter takes the root of the number of patches
            hint = "Make square views"
            require(rows == columns, "images", "be square", tuple(images.shape[-2:]), hint)
        expected = (len(images), rows * columns)
        if mask is not None and tuple(mask.shape) != expected:
            fail("mask", f"have shape {expected}", tuple(mask.shape), "Give one value for each patch of each image")
        if keep is not None and (keep.ndim != 2 or len(keep) != len(images)):
            fail("keep", f"have shape ({len(images)}, K)", tuple(keep.shape), "Give the indices of K patches per image")
        if keep is not None:
            self.check_drops_patches()


def build_masked_backbone(
    backbone: str | nn.Module,
    *,
    small_images: bool = False,
    feature_dim: int | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    tokens: TokenPooling = None,
    defaults: Mapping[str, Any] | None = None,
    mask_token: bool = True,
) -> Backbone:
    """Return a `MaskedViT` and the width of its features; raise with a list of supported backbones otherwise.

    Args:
        backbone: `"small_vit"`; the name of a timm model that is a plain `VisionTransformer`; such a module without
            classifier, or a `MaskedViT`, which are used as they are.
        small_images: Must be False: the patch is chosen with ``backbone_kwargs=dict(img_size=32, patch_size=4)``.
        feature_dim: Width of the features; None reads it from the module.
        backbone_kwargs: Further arguments of the timm model. ``dynamic_img_size`` is True unless given, so that views
            may differ in size.
        tokens: Must be None: the network itself says how its tokens become features.
        defaults: The same, from the method; ``backbone_kwargs`` take precedence.
        mask_token: See `MaskedViT`.

    Raises:
        ValueError: If the name is not that of a network that can mask, ``tokens`` is given, or patches are dropped from
            a network with rotary positions.
        TypeError: If the module is not such a network.
    """
    hint = 'Pass `backbone_kwargs=dict(global_pool="avg")` or "token"'
    require(tokens is None, "tokens", "be None for a backbone that masks patches", tokens, hint)
    if isinstance(backbone, str):
        settings = {"dynamic_img_size": True} | dict(defaults or {}) if _can_mask(backbone) else {}
        backbone_kwargs = settings | check_dict("backbone_kwargs", backbone_kwargs)
    elif isinstance(backbone, nn.Module) and not isinstance(backbone, MaskedViT):
        _check_maskable(backbone)
    module, feature_dim = build_backbone(
        backbone, small_images=small_images, feature_dim=feature_dim, backbone_kwargs=backbone_kwargs
    )
    masked = module if isinstance(module, MaskedViT) else MaskedViT(module, mask_token)
    if not mask_token:
        masked.check_drops_patches()
    return Backbone(masked, feature_dim)


def select_patches(patches: Tensor, indices: Tensor) -> Tensor:
    """Return the patches at one or several sets of indices.

    Args:
        patches: Patches ``(B, N, F)``.
        indices: Indices into N: ``(B, K)``, or ``(B, M, K)`` for M sets per image.

    Returns:
        ``(B, K, F)`` or ``(B, M, K, F)``.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if patches.ndim != 3 or indices.ndim not in (2, 3) or len(indices) != len(patches):
        shapes = tuple(patches.shape), tuple(indices.shape)
        fail("indices", "be (B, K) or (B, M, K) for patches (B, N, F)", shapes, "Give index sets for each image")
    flat = indices.flatten(1)
    found = patches.gather(1, flat.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    return found.view(*indices.shape, patches.shape[-1])


def _can_mask(name: str) -> bool:
    """Return whether a name is that of a network that can mask; refuse timm's networks that cannot."""
    import timm
    from timm.models import is_model_in_modules

    can = name == SMALL_VIT or is_model_in_modules(name.split(".", maxsplit=1)[0], _TIMM_MODULES)
    if not can and timm.is_model(name):
        fail("backbone", "be a vision transformer that can mask its patches", name, _WHO_CAN)
    return can


def _check_maskable(vit: nn.Module) -> None:
    """Refuse a network whose patches cannot be masked one by one."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    rule, kind = "be a vision transformer that can mask its patches", type(vit).__name__
    if not isinstance(vit, VisionTransformer):
        fail("backbone", rule, kind, _WHO_CAN, TypeError)
    if type(vit)._pos_embed is not VisionTransformer._pos_embed or vit.pos_embed is None:
        fail("backbone", f"{rule}, with learned positions of its own", kind, _WHO_CAN, TypeError)
    if not isinstance(vit.patch_embed, PatchEmbed):
        stem = f"{kind} with {type(vit.patch_embed).__name__}"
        fail("backbone", f"{rule}, which needs patches that do not overlap", stem, _WHO_CAN, TypeError)
    if not isinstance(vit.patch_drop, nn.Identity):
        fail("backbone", f"{rule}, without `patch_drop_rate`", kind, "Leave that argument out", TypeError)
