"""Backbones of clips: networks with temporal convolutions, and image networks applied to each frame."""

from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.nn.backbones import BUILT_AS, Backbone, BackboneOptions, build_backbone
from lightning_contrast.precision import upcast

SMALL_VIDEO_CONVNET = "small_video_convnet"
TORCHVISION_NAMES = ("r3d_18", "mc3_18", "r2plus1d_18")
CLIP_NAMES = (SMALL_VIDEO_CONVNET, *TORCHVISION_NAMES)
"""Networks of clips that `build_clip_backbone` builds by name."""


class VideoBackbone(nn.Module):
    """Wrap a network over clips so that it gives features of a clip or of each of its time steps.

    Args:
        trunk: Network from clips with the channels first, ``(B, C, T, H, W)``, to maps ``(B, F, S, h, w)``.
        feature_dim: F.
    """

    def __init__(self, trunk: nn.Module, feature_dim: int) -> None:
        super().__init__()
        check_at_least("feature_dim", feature_dim, 1)
        self.trunk, self.num_features = trunk, feature_dim

    def forward(self, clips: Tensor, *, steps: bool = False) -> Tensor:
        """Return features of clips, averaged over space and time.

        Args:
            clips: ``(B, T, C, H, W)``; images ``(B, C, H, W)`` are clips of one frame.
            steps: Return the features of each time step, averaged over space only.

        Returns:
            ``(B, F)``; with ``steps`` ``(B, S, F)``.
        """
        clips = clips[:, None] if clips.ndim == 4 else clips
        maps: Tensor = self.trunk(clips.transpose(1, 2))
        found = maps.mean((3, 4)).transpose(1, 2)  # (B, S, F)
        return found if steps else found.mean(1)


class SmallVideoConvNet(nn.Module):
    """A small convnet for clips of a few frames of about 32 pixels, which keeps their number of frames.

    Four stages of a 1x3x3 convolution of stride 2 and a 3x1x1 convolution over time, each with BatchNorm and ReLU. It
    is meant for demonstrations and tests on a CPU, not for results.

    Args:
        width: Channels of the first stage, >= 1; the maps have 8 times as many.
        channels: Channels of the frames.
    """

    def __init__(self, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        check_at_least("width", width, 1)
        check_at_least("channels", channels, 1)
        sizes = (channels, width, 2 * width, 4 * width, 8 * width)
        self.stages = nn.Sequential(*(_stage(sizes[i], sizes[i + 1]) for i in range(4)))
        self.num_features = sizes[-1]

    def forward(self, clips: Tensor) -> Tensor:
        """Return maps ``(B, 8 * width, T, h, w)`` of clips ``(B, C, T, H, W)``."""
        return cast("Tensor", self.stages(clips))


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a stage ``(B, in_channels, T, H, W)`` to ``(B, out_channels, T, H / 2, W / 2)``."""
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False),
        nn.BatchNorm3d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv3d(out_channels, out_channels, (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.BatchNorm3d(out_channels),
        nn.ReLU(inplace=True),
    )


def build_clip_backbone(backbone: str | nn.Module | Backbone, **options: Unpack[BackboneOptions]) -> Backbone:
    """Return a backbone for clips.

    Args:
        backbone: ``"r3d_18"``, ``"mc3_18"`` or ``"r2plus1d_18"`` of torchvision with random weights;
            ``"small_video_convnet"`` for `SmallVideoConvNet`; a `VideoBackbone`; or whatever `build_backbone` takes,
            for an image network that is applied to each frame.
        **options: See `BackboneOptions`. ``backbone_kwargs`` are the constructor's; for r3d_18 ``{"keep_time": True}``
            gives the last stage a temporal stride of 1 and a dilation of 2, as TCLR has it: 4 time steps of 16 frames.

    Returns:
        The module and the width of its features: a `VideoBackbone`, or a module of images.

    Raises:
        ValueError: If an option does not fit the network.
    """
    if isinstance(backbone, Backbone):
        return backbone
    video = backbone in CLIP_NAMES if isinstance(backbone, str) else False
    if not video and not isinstance(backbone, VideoBackbone):
        return build_backbone(backbone, **options)
    kwargs = dict(options.pop("backbone_kwargs", None) or {})
    for name, value in options.items():
        hint = "Remove it: it is for image networks, which are applied to each frame"
        require(not value, name, "not be given for a video network", value, hint)
    if isinstance(backbone, VideoBackbone):
        hint = "Give these arguments where you build the module"
        require(not kwargs, "backbone_kwargs", "be None where `backbone` is a module", kwargs, hint)
        return Backbone(backbone, backbone.num_features)
    name = cast("str", backbone)
    settings = {"small_images": False, "backbone_kwargs": dict(kwargs), "tokens": None}
    trunk = SmallVideoConvNet(**kwargs) if name == SMALL_VIDEO_CONVNET else _torchvision_trunk(name, kwargs)
    module = VideoBackbone(trunk, cast("int", getattr(trunk, "num_features", 512)))
    object.__setattr__(module, BUILT_AS, {"name": name, **settings})
    return Backbone(module, module.num_features)


def _torchvision_trunk(name: str, kwargs: dict[str, Any]) -> nn.Sequential:
    """Build a torchvision video network without pooling and classifier."""
    from torchvision.models import video

    keep_time = bool(kwargs.pop("keep_time", False))
    hint = 'Use "r3d_18"; mc3_18 keeps all frames anyway'
    require(not keep_time or name == "r3d_18", "keep_time", "be False for this network", name, hint)
    network = getattr(video, name)(weights=None, **kwargs)
    if keep_time:
        block = network.layer4[0]
        convolution = block.conv1[0]
        convolution.stride, convolution.dilation, convolution.padding = (1, 2, 2), (2, 1, 1), (2, 1, 1)
        block.downsample[0].stride = (1, 2, 2)
    return nn.Sequential(network.stem, network.layer1, network.layer2, network.layer3, network.layer4)


def time_mean(steps: Tensor) -> Tensor:
    """Return the mean over time of steps ``(B, S, F)``, ``(B, F)`` of their dtype; 16 bits are summed in float32."""
    return cast("Tensor", upcast(steps)).mean(1).to(steps.dtype)


def clip_steps(backbone: nn.Module, clips: Tensor) -> Tensor:
    """Return the features of each time step of clips.

    Args:
        backbone: From `build_clip_backbone`. An image network sees all frames of the batch at once.
        clips: ``(B, T, C, H, W)``; images ``(B, C, H, W)`` are clips of one frame.

    Returns:
        ``(B, S, F)``; S is T for an image network.

    Raises:
        ValueError: If it is neither.
    """
    if clips.ndim not in (4, 5):
        fail("clips", "have the shape (B, T, C, H, W)", tuple(clips.shape), "Stack the frames of each clip")
    clips = clips[:, None] if clips.ndim == 4 else clips
    if isinstance(backbone, VideoBackbone) or getattr(backbone, "module", None).__class__ is VideoBackbone:
        return cast("Tensor", backbone(clips, steps=True))
    features: Tensor = backbone(clips.flatten(0, 1))  # (B * T, F)
    return torch.unflatten(features, 0, (-1, clips.shape[1]))


def project_moments(projector: nn.Module, steps: Tensor, count: int) -> Tensor:
    """Return the projections of ``count`` moments of each clip, at which S / J of its S time steps are averaged.

    Args:
        projector: Module from features ``(N, F)`` to projections ``(N, D)``; it sees all moments of the batch at once.
        steps: Features of time steps, ``(B, S, F)``.
        count: J, the number of moments.

    Returns:
        ``(J, B, D)``.

    Raises:
        ValueError: If S is no multiple of J.
    """
    found = steps.shape[1]
    hint = "Give global clips of more frames, or a backbone with another temporal stride, such as keep_time of r3d_18"
    require(found % count == 0, "views", f"give a multiple of {count} time steps per global clip", found, hint)
    moments = torch.unflatten(steps, 1, (count, -1)).flatten(0, 1)  # (B * J, S / J, F)
    projected: Tensor = projector(time_mean(moments))  # (B * J, D)
    return torch.unflatten(projected, 0, (-1, count)).transpose(0, 1)
