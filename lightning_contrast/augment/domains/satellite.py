"""Views of multispectral images from above."""

from collections.abc import Sequence
from typing import Unpack

from lightning_contrast._checks import check_at_least, check_probability
from lightning_contrast.augment.bands import Pairs, check_indices
from lightning_contrast.augment.domains.options import DomainOptions
from lightning_contrast.augment.fused.base import FusedOperation
from lightning_contrast.augment.images import Size, check_size, statistics
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewSpec, odd_tenth

Statistics = Sequence[float] | None
Range = tuple[float, float]

_KEPT = 3  # bands that the dropout leaves


def satellite_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    crop: Range = (0.2, 1.0),
    indices: Pairs = (),
    drop: float = 0.0,
    swap: float = 0.0,
    clouds: float = 0.0,
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of an image with any number of bands, 13 by default as Sentinel-2 has.

    Crop 0.2..1, both flips 0.5, brightness and contrast 0.4 at 0.8 for all bands together, grayscale 0.2 (the mean of
    the bands), blur 0.5 with a kernel of a tenth of the size; no hue, saturation or solarization.

    Source: SSL4EO-S12, https://arxiv.org/abs/2211.07044 and https://github.com/zhu-xlab/SSL4EO-S12, with the vertical
    flip and the blur's kernel of https://github.com/torchgeo/torchgeo. Difference: with 3 channels the grayscale is
    the luma of RGB. Dropout of 1 to 6 bands is commented out in the reference implementation; ``drop=0.5`` is its
    setting.

    Args:
        size: Edge of the views in pixels, or height and width, >= 1.
        mean: One number per channel, subtracted at the end, on the scale of 0..1, index channels included; None leaves
            the views in 0..1.
        std: One number per channel, divided by at the end.
        crop: Range of the crop's share of the image area.
        indices: Index channels to append to the bands; see `append_indices`. They are made of the view's bands after
            the colors, and `eval_transform` appends them too.
        drop: Probability that 1 to 6 channels become their mean, 0 after the normalization; at least 3 stay.
        swap: Probability that two bands, index channels excepted, are exchanged.
        clouds: Probability that 10 to 50 % of a view are covered by clouds, white in every band; no paper has them.
        **options: See `DomainOptions`; ``channels`` is 13 and ``color`` False by default.

    Raises:
        ValueError: If an argument is out of its range, or there are too few bands to drop or swap.

    Example:
        >>> from lightning_contrast.augment.domains import satellite_views
        >>> policy = satellite_views(32, scale=(0, 10_000), indices=[(7, 3)])  # 16-bit reflectance, NDVI
        >>> bands = torch.randint(0, 10_000, (2, 13, 40, 40), dtype=torch.int16)
        >>> [tuple(view.shape) for view in policy(bands)], tuple(policy.eval_transform(bands).shape)
        ([(2, 14, 32, 32), (2, 14, 32, 32)], (2, 14, 32, 32))
    """
    from lightning_contrast.augment.fused import FusedBandDropout, FusedBandSwap, FusedCloud

    check_size(size)
    check_probability("drop", drop)
    check_probability("swap", swap)
    check_probability("clouds", clouds)
    options.setdefault("channels", 13)
    options.setdefault("color", False)
    channels = options["channels"]
    check_at_least("channels", channels, 1)
    total = channels + len(check_indices(indices, channels))
    last: list[FusedOperation] = []
    if swap > 0:
        last.append(FusedBandSwap(channels, swap))
    if drop > 0:
        last.append(FusedBandDropout(total, drop, keep=_KEPT, fill=statistics(mean, std, total)[0]))
    spec = ViewSpec(
        size,
        crop,
        (0.4, 0.4, 0.0, 0.0),
        blur_p=0.5,
        blur_kernel=odd_tenth(size),
        vertical_flip=0.5,
        band_gray=True,
        first_operations=(FusedCloud(clouds),) if clouds > 0 else (),
        last_operations=tuple(last),
    )
    return make_policy([spec, spec], mean=mean, std=std, indices=indices, **options)
