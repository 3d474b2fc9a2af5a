"""Stems of networks: the 3x3 stride-1 stem for small images, and SimCLR's wide stem."""

from typing import Any

from torch import nn

from lightning_contrast._checks import fail

STEM_FAMILIES = frozenset(
    {"ConvNeXt", "CspNet", "MetaNeXt", "NormFreeNet", "RegNet", "ResNetV2", "RexNet", "SmallConvNet", "VovNet"}
)
"""Classes whose ``stem`` may lose its stride; LeViT, MaxViT and others have fixed sizes after the stem."""


def use_small_stem(module: nn.Module) -> nn.Module:
    """Replace the stem of a network by one for small images: stride 1, and no pooling.

    The 7x7 convolution of a ResNet and the patch convolution of a ConvNeXt become 3x3 with stride 1 and padding 1; a
    3x3 convolution (EfficientNet, MobileNetV3, the deep stems) only loses its stride. Pooling in the stem is removed.
    Supported are ResNet, ResNeXt and similar networks of timm and torchvision, timm's EfficientNet, MobileNetV3 and
    others with one ``conv_stem``, and the convolutional families of ``STEM_FAMILIES``. SimCLR's reference
    implementation does the same to ResNets for images of 32 pixels and less.

    Args:
        module: The network, changed in place. New convolutions have He initialization (fan out).

    Returns:
        The same module.

    Raises:
        ValueError: If the family has no such stem; the patch size of a transformer is chosen when it is built.
    """
    name = type(module).__name__
    if hasattr(module, "patch_embed"):
        hint = (
            "Its patches are cut with a fixed size: choose them with "
            "backbone_kwargs=dict(img_size=32, patch_size=4) (and window_size=4 for a Swin) and leave small_images out"
        )
        fail("small_images", f"be False for {name}", True, hint)
    pooled = isinstance(getattr(module, "maxpool", None), nn.Module)
    listed = any(base.__name__ in STEM_FAMILIES for base in type(module).__mro__)
    stems = ("conv1",) if pooled else ("conv_stem", "stem") if listed else ("conv_stem",)
    removed = next((_keep_resolution(module, stem) for stem in stems if hasattr(module, stem)), 0)
    if not removed:
        hint = "Give the module a stem of stride 1 yourself and leave small_images out"
        fail("small_images", f"be False for {name}, whose stem is not known", True, hint)
    if pooled:
        removed *= 1 if isinstance(module.maxpool, nn.Identity) else 2
        module.maxpool = nn.Identity()
    info: Any = getattr(module, "feature_info", None)
    if isinstance(info, list):  # timm's record of how much smaller than the image each stage's map is
        for stage in info:
            stage["reduction"] = max(1, stage["reduction"] // removed)
    return module


def _keep_resolution(parent: nn.Module, name: str) -> int:
    """Remove stride and pooling from a stem; return its former downsampling factor, 0 without convolution."""
    stem = getattr(parent, name)
    if isinstance(stem, nn.Conv2d):
        stride = stem.stride[0]
        setattr(parent, name, _stride_one(stem))
        return stride
    removed, pooled = 0, 1
    for child_name, child in list(stem.named_children()):
        if isinstance(child, nn.MaxPool2d | nn.AvgPool2d | nn.ConstantPad2d):
            stride = getattr(child, "stride", 1)
            pooled *= stride if isinstance(stride, int) else stride[0]
            setattr(stem, child_name, nn.Identity())
        else:
            factor = _keep_resolution(stem, child_name)
            removed = max(removed, 1) * factor if factor else removed
    return removed * pooled


def _stride_one(conv: nn.Conv2d) -> nn.Conv2d:
    """Return the convolution with stride 1: itself if it is 1x1 or 3x3, else a new 3x3 one."""
    if conv.kernel_size[0] in (1, 3):
        conv.stride = (1, 1)
        return conv
    small = type(conv)(
        conv.in_channels, conv.out_channels, 3, stride=1, padding=1, groups=conv.groups, bias=conv.bias is not None
    ).to(conv.weight)
    return _initialize(small)


def _initialize(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def widen_stem(model: Any, channels: int) -> None:
    """Give a timm ResNet a stem with this number of channels, and a first block to match.

    Args:
        model: A timm ``ResNet`` with the plain 7x7 stem, changed in place.
        channels: Channels of the stem, which are also the planes of the first stage.
    """
    old = model.layer1[0]
    model.conv1 = _initialize(nn.Conv2d(model.conv1.in_channels, channels, 7, stride=2, padding=3, bias=False))
    model.bn1 = type(model.bn1)(channels)
    out_channels = channels * old.expansion
    shortcut = None
    if out_channels != channels:
        conv = _initialize(nn.Conv2d(channels, out_channels, 1, bias=False))
        shortcut = nn.Sequential(conv, type(model.bn1)(out_channels))
    block = type(old)(channels, channels, downsample=shortcut)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            _initialize(module)
    block.zero_init_last()
    model.layer1[0] = block
    model.feature_info[0]["num_chs"] = channels
