"""Views of fluorescence microscopy."""

from collections.abc import Sequence
from typing import Unpack

from lightning_contrast._checks import check_at_least, check_probability
from lightning_contrast.augment.domains.options import DomainOptions
from lightning_contrast.augment.fused.base import FusedOperation
from lightning_contrast.augment.images import Size, statistics
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewSpec

Statistics = Sequence[float] | None
Range = tuple[float, float]


def microscopy_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    crop: Range = (0.4, 1.0),
    gain: float = 0.2,
    drop: float = 0.0,
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of cells in any number of fluorescence channels, 5 by default as in Cell Painting.

    Crop 0.4..1; both flips 0.5 and quarter turns, as a plate has no upper side; each channel is multiplied by
    U(0.8, 1.2) of its own, as its exposure varies, and clipped; no blur, hue, saturation or grayscale, as every channel
    is another structure.

    Source: dropped channels as those of https://arxiv.org/abs/2309.16108 (ChannelViT), which draws a subset for a whole
    batch and leaves the others out; here they are drawn per view and become their mean. The other numbers are no
    paper's. Images should be standardized per plate before, or the plate is a shortcut.

    Args:
        size: Edge of the views in pixels, or height and width, >= 1.
        mean: As in `moco_v1_views`, one number per channel.
        std: As in `moco_v1_views`, one number per channel.
        crop: Range of the crop's share of the image area; the size of cells is a label.
        gain: Strength of the factor of each channel, in 0..1.
        drop: Probability that some channels, all but one at most, become their mean.
        **options: See `DomainOptions`; ``channels`` is 5 and ``color`` False by default.

    Raises:
        ValueError: If an argument is out of its range.
    """
    from lightning_contrast.augment.fused import FusedBandDropout, FusedBandGain

    check_probability("drop", drop)
    options.setdefault("channels", 5)
    options.setdefault("color", False)
    channels = options["channels"]
    check_at_least("channels", channels, 1)
    last: list[FusedOperation] = []
    if drop > 0:
        fill = statistics(mean, std, channels)[0]
        last.append(FusedBandDropout(channels, drop, most=max(1, channels - 1), keep=1, fill=fill))
    spec = ViewSpec(
        size,
        crop,
        jitter_p=0.0,
        gray_p=0.0,
        vertical_flip=0.5,
        quarter_turns=True,
        first_operations=(FusedBandGain(channels, gain),),
        last_operations=tuple(last),
    )
    return make_policy([spec, spec], mean=mean, std=std, **options)
