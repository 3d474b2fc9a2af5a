"""Views of road scenes."""

from collections.abc import Sequence
from typing import Unpack

from lightning_contrast._checks import check_probability, require
from lightning_contrast.augment.domains.options import DomainOptions
from lightning_contrast.augment.fused.base import FusedOperation
from lightning_contrast.augment.images import Size, check_size
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewSpec, odd_tenth

Statistics = Sequence[float] | None
Range = tuple[float, float]

_DROPS = 0.002  # per pixel: 100 in a view of 224 pixels
_LEAST = 16  # pixels of the shorter edge at which rain and motion have a length


def driving_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    crop: Range = (0.4, 1.0),
    flip: float = 0.5,
    rain: float = 0.1,
    snow: float = 0.1,
    fog: float = 0.1,
    flare: float = 0.1,
    motion: float = 0.1,
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of a road scene, in other weather and light.

    Crop 0.4..1, at least as wide as high relative to the view, as the road is; flip 0.5; jitter (0.4, 0.4, 0.4, 0.1)
    at 0.8; each at 0.1: fog of an opacity of 0.2..0.6, rain, snow on what is dark, lens flare, and motion blur along
    any direction with a kernel of a tenth of the shorter edge. No vertical flip or rotation, grayscale or solarization.

    Source: no paper's numbers; ImageNet-C, https://arxiv.org/abs/1903.12261, has fog, snow and motion blur as
    corruptions of a test: results on those after training with them say less than they seem to. Rain, snow and motion
    blur are Kornia's.

    Args:
        size: Edge of the views in pixels, or height and width such as (192, 384), >= 1; >= 16 with rain or motion blur.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        crop: Range of the crop's share of the image area.
        flip: Probability of a horizontal flip; 0 where signs are read or the side of the road matters.
        rain: Probability of rain.
        snow: Probability of snow; needs 3 channels.
        fog: Probability of fog.
        flare: Probability of lens flare.
        motion: Probability of motion blur.
        **options: See `DomainOptions`; ``channels`` is 3 or 1, with others ``rain=snow=0`` and ``color=False``.

    Raises:
        ValueError: If an argument is out of its range.
    """
    import kornia.augmentation as K

    from lightning_contrast.augment.fused import FusedCloud, FusedFlare, KorniaOperation

    height, width = check_size(size)
    shorter, channels = min(height, width), options.get("channels", 3)
    weather = {"rain": rain, "snow": snow, "fog": fog, "flare": flare, "motion": motion}
    for name, p in weather.items():
        check_probability(name, p)
    hint = "Give larger views, or `rain=0` and `motion=0`"
    require(shorter >= _LEAST or rain == motion == 0, "size", "be >= 16 with rain or motion blur", size, hint)
    require(channels == 3 or snow == 0, "snow", "be 0 unless `channels` is 3", snow, "Give `snow=0`")
    require(channels in (1, 3) or rain == 0, "rain", "be 0 unless `channels` is 1 or 3", rain, "Give `rain=0`")
    first: list[FusedOperation] = []
    if fog > 0:
        first.append(FusedCloud(fog, (1.0, 1.0), (0.2, 0.6), value=0.8, softness=4.0))
    if rain > 0:
        drops = max(1, round(_DROPS * height * width))
        longest = max(2, shorter // 11)
        length = (max(2, shorter // 45), longest)
        falling = K.RandomRain((drops, drops), length, (-max(1, longest // 4), max(1, longest // 4)))
        first.append(KorniaOperation(falling, rain))
    if snow > 0:
        first.append(KorniaOperation(K.RandomSnow((0.3, 0.6), (1.5, 2.5)), snow))
    if flare > 0:
        first.append(FusedFlare(flare))
    if motion > 0:
        kernel = max(3, odd_tenth(size))
        first.append(KorniaOperation(K.RandomMotionBlur(kernel, 90.0, 1.0, border_type="replicate"), motion))
    aspect = width / height
    ratio = (aspect, aspect * 4 / 3)
    colors = (0.4, 0.4, 0.4, 0.1)
    spec = ViewSpec(size, crop, colors, gray_p=0.0, flip=flip, ratio=ratio, first_operations=tuple(first))
    return make_policy([spec, spec], mean=mean, std=std, **options)
