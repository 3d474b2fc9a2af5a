"""Backbones: timm models by name, SimCLR's wide ResNets, a small convnet, and any module of the user."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_dict, fail
from lightning_contrast.nn.feature_output import FeatureOutput, TokenPooling
from lightning_contrast.nn.small_vit import SMALL_VIT, small_vit
from lightning_contrast.nn.stems import use_small_stem, widen_stem

_VIT_NAME = re.compile(r"small_vit$|(vit|deit3?)_(tiny|small|medium|base|large|huge|giant|gigantic)_patch\d+")


SMALL_CONVNET = "small_convnet"
BUILT_AS = "built_as"
"""Attribute of a built module: its name (None for a module of the user), stem and arguments, for export."""
ARCHITECTURE = "architecture"
"""Key of the same in the file of an exported backbone."""
PREFIX = "needs_load_backbone."
"""Prefix of exported weights that another network would accept, and compute other features with."""
_WIDE_NAME = re.compile(r"resnet(18|34|50|101|152)x(\d+)")
_STAGE_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Backbone(NamedTuple):
    """A backbone and the width of its features."""

    module: nn.Module
    feature_dim: int


class BackboneOptions(TypedDict, total=False):
    """Keyword arguments that every method passes to `build_backbone`.

    Attributes:
        small_images: Use a stem for small images (3x3, stride 1, no max-pool). Default: False.
        feature_dim: Width F of the features; None (default) reads ``num_features`` of the backbone.
        backbone_kwargs: Further arguments of `timm.create_model`, such as ``{"img_size": 32, "patch_size": 4}``.
        tokens: Pooling of a backbone that returns tokens: "mean", "cls" or None, see `build_backbone`.
    """

    small_images: bool
    feature_dim: int | None
    backbone_kwargs: dict[str, Any] | None
    tokens: TokenPooling


def build_backbone(
    backbone: str | nn.Module,
    *,
    small_images: bool = False,
    feature_dim: int | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    tokens: TokenPooling = None,
) -> Backbone:
    """Return a backbone that maps images ``(B, C, H, W)`` to features ``(B, feature_dim)``.

    Args:
        backbone: A timm name; ``"resnet50x2"`` and its like (18, 34, 50, 101 or 152 layers) for SimCLR's ResNets with
            a multiple of all channels; ``"small_convnet"`` for `SmallConvNet` and ``"small_vit"`` for `small_vit`; or
            a module, which is used as it is and not copied.
        small_images: Give the network a 3x3 stride-1 stem without max-pool, in place, so that images of about 32
            pixels keep their resolution (see `use_small_stem`).
        feature_dim: Width of the features; None reads it from the module.
        backbone_kwargs: Further arguments of the constructor that ``backbone`` names, such as ``in_chans``.
        tokens: Pooling of the tokens ``(B, N, F)`` that some networks return: "mean", or "cls" for the first one. Maps
            are averaged and outputs of the Transformers library are read without it, see `FeatureOutput`.

    Returns:
        The module and the width of its features. A convolutional network built from a name is channels-last, with
        unchanged values: a ResNet-18 with the small stem is about 1.5 times as fast on a CPU.

    Raises:
        ValueError: If the name is unknown, the stem cannot be made small, or the width cannot be read.
        TypeError: If ``backbone`` is neither a name nor a module, or ``backbone_kwargs`` no dict.
    """
    kwargs = check_dict("backbone_kwargs", backbone_kwargs)
    if isinstance(backbone, str):
        module = _create(backbone, kwargs)
    elif isinstance(backbone, nn.Module):
        if kwargs:
            hint = "Give these arguments where you build the module, or pass a timm name"
            fail("backbone_kwargs", "be None where `backbone` is a module", kwargs, hint)
        module = backbone
    else:
        hint = 'Pass a timm name such as "resnet18", or a module'
        fail("backbone", "be a name or an nn.Module", type(backbone).__name__, hint, TypeError)
    if feature_dim is not None:
        check_at_least("feature_dim", feature_dim, 1)
    else:
        feature_dim = read_feature_dim(module)
    if small_images:
        use_small_stem(module)
    FeatureOutput.attach(module, feature_dim, tokens)
    if isinstance(backbone, str) or small_images or tokens is not None:
        settings = {"small_images": small_images, "backbone_kwargs": kwargs, "tokens": tokens}
        object.__setattr__(module, BUILT_AS, {"name": backbone if isinstance(backbone, str) else None, **settings})
    if isinstance(backbone, str) and not hasattr(module, "patch_embed"):
        module.to(memory_format=torch.channels_last)  # convolutions run faster
    return Backbone(module, feature_dim)


def strip_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return exported weights under the names that they have in the network.

    Args:
        weights: Tensors of any shape by name.
    """
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}


def read_feature_dim(module: nn.Module) -> int:
    """Return the width of the features that ``module`` yields, without running it.

    timm's ``num_features`` is the width before the last pooling and, in MobileNetV3 and some others, before one more
    layer; ``head_hidden_size`` is the output width without a classifier, so it takes precedence.

    Args:
        module: A network without classifier.

    Raises:
        ValueError: If the module has no such attribute, or still has its classifier.
    """
    classes = getattr(module, "num_classes", 0)
    if isinstance(classes, int) and classes > 0 and hasattr(module, "reset_classifier"):
        hint = "Call `reset_classifier(0)` on it, or pass `feature_dim` if its outputs are what you want"
        fail("backbone", "have no classifier", f"{type(module).__name__} with {classes} classes", hint)
    for name in ("head_hidden_size", "num_features"):
        width = getattr(module, name, None)
        if isinstance(width, int) and width > 0:
            return width
    config = getattr(module, "config", None)  # of the Transformers library
    sizes = getattr(config, "hidden_sizes", None) or [getattr(config, "hidden_size", None)]
    if isinstance(sizes[-1], int):
        return sizes[-1]
    hint = "Pass `feature_dim`, the width of the features that it returns without a classifier"
    fail("backbone", "have the width of its features as `num_features`", type(module).__name__, hint)


def check_image_size(module: nn.Module, images: Tensor) -> None:
    """Check that a backbone can take images of this size and this number of channels.

    Reads attributes only, so it may run on every batch. A network without these attributes is not checked.

    Args:
        module: The backbone.
        images: Images ``(B, C, H, W)``.

    Raises:
        ValueError: If the backbone was built for another image size or another number of channels.
    """
    channels, height, width = images.shape[-3:]
    expected = _in_channels(module)
    if expected is not None and expected != channels:
        hint = f"Build the backbone with backbone_kwargs=dict(in_chans={channels}), or convert the images"
        fail("images", f"have {expected} channels for this {type(module).__name__}", channels, hint)
    patch_embed = getattr(module, "patch_embed", None)
    if patch_embed is not None:
        _check_patches(type(module).__name__, patch_embed, height, width)
        return
    info = getattr(module, "feature_info", None)
    reduction = info[-1].get("reduction") if isinstance(info, list) and info else None
    if isinstance(reduction, int) and min(height, width) < reduction and _has_unpadded_stride(module):
        hint = "Enlarge the images, or set small_images=True"
        fail(
            "images",
            f"be at least {reduction} pixels wide and high for this {type(module).__name__}",
            (height, width),
            hint,
        )


def _check_patches(name: str, patch_embed: nn.Module, height: int, width: int) -> None:
    """Check the size of the images against the patch embedding of a network."""
    size = getattr(patch_embed, "img_size", None)
    patch = getattr(patch_embed, "patch_size", None)
    if size is not None and getattr(patch_embed, "strict_img_size", True):
        if tuple(size) != (height, width):
            hint = (
                f"Build the backbone with backbone_kwargs=dict(img_size={height}, patch_size=...), "
                f"or make views of {size[0]} pixels"
            )
            fail("images", f"be {size[0]} x {size[1]} pixels for this {name}", (height, width), hint)
        return
    divisible = not isinstance(patch, tuple) or (height % patch[0] == 0 and width % patch[1] == 0)
    if not divisible and not getattr(patch_embed, "dynamic_img_pad", False):
        hint = "Make views of such a size, or add dynamic_img_pad=True to backbone_kwargs"
        fail("images", f"have sides that are multiples of {patch} for this {name}", (height, width), hint)


def _in_channels(module: nn.Module) -> int | None:
    """Return the number of input channels of a network of a known family."""
    for path in ("patch_embed.proj", "conv1", "conv_stem", "stem"):
        stem: nn.Module | None = module
        for name in path.split("."):
            stem = getattr(stem, name, None)
        conv = (
            next((m for m in stem.modules() if isinstance(m, nn.Conv2d)), None) if isinstance(stem, nn.Module) else None
        )
        if conv is not None:
            return conv.in_channels
    return None


def _has_unpadded_stride(module: nn.Module) -> bool:
    """Return whether a network has strided convolutions without padding, which need a map of their kernel's size."""
    convs = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    return any(c.stride[0] > 1 and c.kernel_size[0] > 1 and c.padding in (0, (0, 0)) for c in convs)


def _create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build the network of this name without a classifier."""
    if "num_classes" in kwargs:
        hint = "Leave it out: a backbone has no classifier"
        fail("backbone_kwargs", "not hold `num_classes`", kwargs["num_classes"], hint)
    if name == SMALL_CONVNET:
        kwargs = {("channels" if key == "in_chans" else key): value for key, value in kwargs.items()}
        return SmallConvNet(**kwargs)
    if name == SMALL_VIT:
        return small_vit(**kwargs)
    wide = _WIDE_NAME.fullmatch(name)
    if wide is not None:
        return _wide_resnet(int(wide[1]), int(wide[2]), kwargs)
    import timm

    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        known = [*timm.list_models(), SMALL_CONVNET, SMALL_VIT, "resnet18x2", "resnet50x2", "resnet50x4"]
        near = get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(map(repr, near))}" if near else "See timm.list_models() for the names"
        fail("backbone", "be a name that timm knows, or a module", name, hint)
    return timm.create_model(name, num_classes=0, **kwargs)


def _wide_resnet(depth: int, width: int, kwargs: dict[str, Any]) -> nn.Module:
    """Build SimCLR's ResNet: ``width`` times the channels of the stem and of every stage.

    Based on https://github.com/google-research/simclr (resnet.py); timm's class widens the stages but not the stem.
    """
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    check_at_least("width", width, 1, "Give a name such as 'resnet50x2'")
    block: Any = BasicBlock if depth < 50 else Bottleneck
    channels = tuple(width * c for c in (64, 128, 256, 512))
    model = ResNet(block, _STAGE_DEPTHS[depth], num_classes=0, channels=channels, **kwargs)
    widen_stem(model, channels[0])
    return cast("nn.Module", model)


class SmallConvNet(nn.Module):
    """A small convnet for images of about 32 pixels: four 3x3 convolutions with BatchNorm and ReLU, mean over the map.

    Every stage halves the map, and all but the first double the channels: ``width``, 2, 4 and 8 times that. It is
    meant for demonstrations and tests on a CPU, not for results. Its tensors are channels-last, which is about a third
    faster there.

    Args:
        width: Channels of the first stage; the features have 8 times as many.
        channels: Channels of the images.
    """

    def __init__(self, width: int = 24, channels: int = 3) -> None:
        super().__init__()
        check_at_least("width", width, 1)
        check_at_least("channels", channels, 1)
        sizes = (channels, width, 2 * width, 4 * width, 8 * width)
        self.stem = _conv_stage(sizes[0], sizes[1])
        self.stages = nn.Sequential(*(_conv_stage(sizes[i], sizes[i + 1]) for i in range(1, 4)))
        self.num_features = sizes[-1]
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``(B, 8 * width)`` of images ``(B, C, H, W)``."""
        images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.stages(self.stem(images)).mean((2, 3))
        return features


def _conv_stage(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a stride-2 convolution, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def with_vit_defaults(backbone: str | nn.Module, options: BackboneOptions) -> BackboneOptions:
    """Return the options of a multi-crop student: a ViT by name accepts views of any size and has a drop path of 0.1.

    Args:
        backbone: Name or module, as given to the method; a module is not changed.
        options: Options as given to the method; they take precedence.
    """
    kwargs = options.get("backbone_kwargs")
    if isinstance(backbone, str) and _VIT_NAME.match(backbone):
        kwargs = {"dynamic_img_size": True, "drop_path_rate": 0.1} | (kwargs or {})
    return {**options, "backbone_kwargs": kwargs}
