"""A small vision transformer by name, the counterpart of `SmallConvNet`."""

from typing import Any

from torch import nn

from lightning_contrast.nn.rope import use_rope

SMALL_VIT = "small_vit"


def small_vit(*, rope: bool = False, **kwargs: Any) -> nn.Module:
    """Return timm's `VisionTransformer` in a size for images of about 32 pixels.

    Patches of 4 pixels, width 192, 6 blocks of 3 heads: half the depth of a ViT-Ti. It accepts images of any size that
    is a multiple of the patch; positions are resampled from those of 32 pixels. It is meant for demonstrations and
    tests on a CPU, not for results.

    Args:
        rope: Rotary positions instead of learned ones, see `use_rope`.
        **kwargs: Arguments of timm's `VisionTransformer` that replace these, such as ``depth``, ``reg_tokens``
            (registers), ``init_values`` (LayerScale) or ``drop_path_rate``.
    """
    from timm.models.vision_transformer import VisionTransformer

    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "dynamic_img_size": True}
    vit = VisionTransformer(**(settings | {"num_classes": 0} | kwargs))
    return use_rope(vit) if rope else vit
